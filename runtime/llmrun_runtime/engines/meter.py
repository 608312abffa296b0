"""Counts what requests used, in the engine's process, where the tokens are made. Standard library only.

Streams are not touched: who meters notes what the engine's core gives out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

Row = tuple[str, str, int, int, int, int]
"""Key, adapter, requests, tokens of prompts, of answers, and those of prompts that were cached."""


@dataclass
class Counts:
    """Of one key and adapter, since the engine's start."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Request:
    """One HTTP request: it is counted once, whatever number of prompts it has."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._counted = False

    def note(self, adapter: str = "", prompt: int = 0, completion: int = 0, cached: int = 0) -> None:
        """The engine has worked on it: so many tokens more."""
        counts = _counts.setdefault((self.key, adapter), Counts())
        counts.requests += not self._counted
        self._counted = True
        counts.prompt_tokens += prompt
        counts.completion_tokens += completion
        counts.cached_tokens += cached


_counts: dict[tuple[str, str], Counts] = {}
_current: ContextVar[Request | None] = ContextVar("llmrun_request", default=None)


def current() -> Request | None:
    """The request that this task works on; None for the engine's own doings."""
    return _current.get()


@contextlib.contextmanager
def metered(key: str) -> Iterator[None]:
    """What is noted meanwhile, in this task and those that it starts, was used by the key of that name ("": none)."""
    token = _current.set(Request(key))
    try:
        yield
    finally:
        _current.reset(token)


def rows() -> list[Row]:
    """Everything so far."""
    return [
        (key, adapter, c.requests, c.prompt_tokens, c.completion_tokens, c.cached_tokens)
        for (key, adapter), c in _counts.items()
    ]
