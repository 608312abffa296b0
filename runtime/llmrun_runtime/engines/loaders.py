"""Which kind of engine takes adapters how."""

from __future__ import annotations

from typing import Any

from llmrun.errors import EngineError
from llmrun_runtime.engines.adapters import Loader


def get_loader(engine: str, app: Any, max_rank: int) -> Loader:
    """For an engine of that kind, by its server's `app`. Raises EngineError where adapters are not supported."""
    if engine == "vllm":
        from llmrun_runtime.engines.vllm_adapters import VLLMAdapters  # noqa: PLC0415 - imports vLLM

        return VLLMAdapters(app, max_rank)
    raise EngineError(f"engine {engine!r} takes no adapters: leave lora= out")
