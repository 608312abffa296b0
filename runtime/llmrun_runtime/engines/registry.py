"""Finds engines by name: llmrun's own, and those of installed packages.

A package adds an engine with an entry point in the group `llmrun.engines`: `name = "package.module:Class"`. The class
implements `engines.api.Engine` and takes no arguments.
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
    """Return the engine with this name. Raises EngineError if it is not found or fails to load."""
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise EngineError(f"engine={name!r} not found; available: {', '.join(sorted(points))}")
    try:
        engine: Engine = points[name].load()()
    except Exception as error:  # third-party code
        log.exception("engine %s failed to load", name)
        text = f"engine={name!r}: failed to load {points[name].value} ({type(error).__name__}: {error})"
        raise EngineError(text) from None
    return engine
