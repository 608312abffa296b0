"""The kinds of engine that there are."""

from __future__ import annotations

from llmrun.errors import EngineError
from llmrun_runtime.engines.base import Engine
from llmrun_runtime.engines.vllm import VLLM

KINDS: tuple[Engine, ...] = (VLLM(),)


def get_engine(name: str) -> Engine:
    """The engine called `name`. Raises EngineError, with those that exist, for an unknown one."""
    engines = {engine.name: engine for engine in KINDS}
    if name not in engines:
        raise EngineError(f"engine={name!r}: there is no such engine; there are {', '.join(engines)}")
    return engines[name]
