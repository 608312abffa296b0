"""Counts what requests used, in the engine's process, where the tokens are generated. Standard library only.

The counts are module-level state on purpose: an engine has one API process, which serves one model, so there is one
meter per process. Code deep inside the engine's server can then count without a reference to it. Counts start at zero
with the process and only grow.

Streams are not intercepted: engine-specific code records what the engine's core produces.
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
    """The totals of one key and adapter since the engine's start."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class MeteredRequest:
    """One HTTP request. It is counted once, even if it has several prompts."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._counted = False

    def record(self, adapter: str = "", prompt: int = 0, completion: int = 0, cached: int = 0) -> None:
        """Add tokens that the engine processed for this request."""
        counts = _counts.setdefault((self.key, adapter), Counts())
        counts.requests += not self._counted
        self._counted = True
        counts.prompt_tokens += prompt
        counts.completion_tokens += completion
        counts.cached_tokens += cached


class Stream:
    """One streamed answer: measures the mean time per token after the first chunk."""

    def __init__(self, adapter: str) -> None:
        self._adapter = adapter
        self._first_at = self._last_at = 0.0
        self._tokens_after_first = 0

    def add(self, tokens: int) -> None:
        """Add a chunk with this number of tokens, sent now."""
        now = time.perf_counter()
        if self._first_at:
            self._tokens_after_first += tokens
            self._last_at = now
        else:
            self._first_at = now

    def finish(self, tokens: int = 0) -> None:
        """Count the stream, if it had more than one chunk: a single chunk has no pace.

        `tokens`: the total of the whole answer, where that is more exact than the sum over its chunks.
        """
        if self._tokens_after_first:
            pace = (self._last_at - self._first_at) / (tokens - 1 if tokens > 1 else self._tokens_after_first)
            counts = _paces.setdefault(self._adapter, [0] * (len(PACE_BUCKETS) + 1))
            counts[bisect_left(PACE_BUCKETS, pace)] += 1
            _pace_sums[self._adapter] = _pace_sums.get(self._adapter, 0.0) + pace


_counts: dict[tuple[str, str], Counts] = {}
_paces: dict[str, list[int]] = {}
_pace_sums: dict[str, float] = {}
_current: ContextVar[MeteredRequest | None] = ContextVar("llmrun_request", default=None)


def current() -> MeteredRequest | None:
    """Return the request that the current task serves; None for the engine's internal work."""
    return _current.get()


@contextlib.contextmanager
def metered(key: str) -> Iterator[None]:
    """Attribute usage in this context, and in tasks started from it, to the API key of this name ("": no key)."""
    token = _current.set(MeteredRequest(key))
    try:
        yield
    finally:
        _current.reset(token)


def rows() -> list[Row]:
    """Return the usage since the engine's start, by key and adapter."""
    return [
        (key, adapter, c.requests, c.prompt_tokens, c.completion_tokens, c.cached_tokens)
        for (key, adapter), c in _counts.items()
    ]


def paces() -> list[PaceRow]:
    """Return the times per output token of all streams since the engine's start, by adapter."""
    return [(adapter, _pace_sums[adapter], *counts) for adapter, counts in _paces.items()]
