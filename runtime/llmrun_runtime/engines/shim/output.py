"""Standard output and error of an engine's process, which go to its log: a full disk costs lines, not the engine.

Standard library only.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TextIO

_TOLERANT = "llmrun_tolerant"


def ignore_write_errors() -> None:
    """Drop text that cannot be written to standard output or error, instead of an OSError. Can be called repeatedly."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not getattr(stream, _TOLERANT, False):
            _make_tolerant(stream)


def _make_tolerant(stream: TextIO) -> None:
    # In place, as vLLM does for its prefix: others hold a reference to the stream.
    for name in ("write", "flush"):
        setattr(stream, name, _tolerant(getattr(stream, name)))
    setattr(stream, _TOLERANT, True)


def _tolerant(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: str) -> Any:
        try:
            return method(*args)
        except OSError:
            return sum(map(len, args))

    return call
