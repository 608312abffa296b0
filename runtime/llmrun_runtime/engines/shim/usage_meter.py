"""Counts what requests used, in the engine's process, where the tokens are generated. Standard library only.

The counts are module-level state on purpose: an engine has one API process, which serves one model, so there is one
meter per process. Code deep inside the engine's server can then count without a reference to it. Counts start at zero
with the process and only grow.

Streams are not intercepted: engine-specific code records what the engine's core produces.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from llmrun_runtime.wire.usage import PACE_BUCKETS, PaceRow, Row


class _Numbered(Protocol):
    number: int
    """Of the snapshot that contains its last change."""


T = TypeVar("T", bound=_Numbered)


@dataclass
class Counts:
    """The totals of one key and adapter since the engine's start."""

    number: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Paces:
    """The times per output token of one adapter's streams since the engine's start."""

    number: int = 0
    total: float = 0
    """Their sum, in seconds."""
    buckets: list[int] = field(default_factory=lambda: [0] * (len(PACE_BUCKETS) + 1))


class MeteredRequest:
    """One HTTP request. It is counted once, even if it has several prompts."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.reached_engine = False
        """Whether the engine has begun to work for it: what fails before that is the reading of the request."""
        self._counted = False

    def record(self, adapter: str = "", prompt: int = 0, completion: int = 0, cached: int = 0) -> None:
        """Add tokens that the engine processed for this request."""
        mark_output()
        counts = _changed(_counts, (self.key, adapter), Counts)
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
            paces = _changed(_paces, self._adapter, Paces)
            paces.buckets[bisect_left(PACE_BUCKETS, pace)] += 1
            paces.total += pace


_counts: OrderedDict[tuple[str, str], Counts] = OrderedDict()
"""The row that changed last is the last."""
_paces: OrderedDict[str, Paces] = OrderedDict()
_number = 1
"""The number of the next snapshot."""
_last_output = time.monotonic()
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


def mark_output() -> None:
    """Record that the engine has produced something now, for whichever request: it does not hang."""
    global _last_output  # noqa: PLW0603 - see above
    _last_output = time.monotonic()


def last_output() -> float:
    """Return when the engine last produced something (`time.monotonic`); at first, when it was started."""
    return _last_output


def snapshot(since: int = 0) -> dict[str, Any]:
    """Return the rows that changed after the snapshot with the number `since`, and this snapshot's number.

    A row has the totals since the engine's start: `usage` by key and adapter (Row), `paces` by adapter (PaceRow).
    """
    global _number
    number, _number = _number, _number + 1
    usage: list[Row] = [
        (key, adapter, c.requests, c.prompt_tokens, c.completion_tokens, c.cached_tokens)
        for (key, adapter), c in _changed_after(_counts, since)
    ]
    paces: list[PaceRow] = [(adapter, p.total, *p.buckets) for adapter, p in _changed_after(_paces, since)]
    return {"number": number, "usage": usage, "paces": paces}


def _changed(rows: OrderedDict[Any, T], key: Any, kind: type[T]) -> T:
    """Return the row of this key, which changes now."""
    row = rows.get(key)
    if row is None:
        row = rows[key] = kind()
    if row.number != _number:
        row.number = _number
        rows.move_to_end(key)
    return row


def _changed_after(rows: OrderedDict[Any, T], since: int) -> Iterator[tuple[Any, T]]:
    return itertools.takewhile(lambda item: item[1].number > since, reversed(rows.items()))
