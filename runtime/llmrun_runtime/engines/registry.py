"""The kinds of engine that there are: llmrun's own, and those of installed packages.

A package brings one with an entry point of the group `llmrun.engines`: `name = "package.module:Class"`, a class that
keeps to `engines.base.Engine` and is made without arguments.
"""

from __future__ import annotations

import functools
import logging
from importlib.metadata import entry_points

from llmrun.errors import EngineError
from llmrun_runtime.engines.base import Engine

GROUP = "llmrun.engines"
log = logging.getLogger("llmrun.engines")


@functools.cache
def get_engine(name: str) -> Engine:
    """The engine called `name`. Raises EngineError for one that there is not, or that cannot be loaded."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise EngineError(f"engine={name!r}: there is no such engine; there are {', '.join(sorted(found))}")
    try:
        engine: Engine = found[name].load()()
    except Exception as error:  # somebody else's code
        log.exception("the engine %s cannot be loaded", name)
        text = f"engine={name!r}: {found[name].value} cannot be loaded ({type(error).__name__}: {error})"
        raise EngineError(text) from None
    return engine
