"""Counts what requests used, in the engine's process, where the tokens are made. Standard library only.

Streams are not touched: who meters notes what the engine's core gives out.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from llmrun_runtime.wire.usage import PACE_BUCKETS, PaceRow, Row


@dataclass
class Counts:
    """Of one key and adapter, since the engine's start."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class MeteredRequest:
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


class Stream:
    """One answer that is given out bit by bit: how long a token after the first took, on the average."""

    def __init__(self, adapter: str) -> None:
        self._adapter = adapter
        self._first = self._last = 0.0
        self._after = 0

    def came(self, tokens: int) -> None:
        """So many more have been given out."""
        now = time.perf_counter()
        if self._first:
            self._after += tokens
            self._last = now
        else:
            self._first = now

    def ended(self, tokens: int = 0) -> None:
        """Count it, if it had more than one bit: an answer that comes whole has no pace.

        `tokens`: all that it had, where that is known better than by its bits.
        """
        if self._after:
            pace = (self._last - self._first) / (tokens - 1 if tokens > 1 else self._after)
            counts = _paces.setdefault(self._adapter, [0] * (len(PACE_BUCKETS) + 1))
            counts[bisect_left(PACE_BUCKETS, pace)] += 1
            _pace_sums[self._adapter] = _pace_sums.get(self._adapter, 0.0) + pace


_counts: dict[tuple[str, str], Counts] = {}
_paces: dict[str, list[int]] = {}
_pace_sums: dict[str, float] = {}
_current: ContextVar[MeteredRequest | None] = ContextVar("llmrun_request", default=None)


def current() -> MeteredRequest | None:
    """The request that this task works on; None for the engine's own doings."""
    return _current.get()


@contextlib.contextmanager
def metered(key: str) -> Iterator[None]:
    """What is noted meanwhile, in this task and those that it starts, was used by the key of that name ("": none)."""
    token = _current.set(MeteredRequest(key))
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


def paces() -> list[PaceRow]:
    """The times per output token of all streams so far, by adapter."""
    return [(adapter, _pace_sums[adapter], *counts) for adapter, counts in _paces.items()]
