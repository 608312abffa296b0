"""Rate and concurrency limits of keys and models. In memory; the clock is an argument."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmrun.wire import KeyInfo
from llmrun_runtime.ingress.admission.output_tokens import OutputCap
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.rate_window import WINDOW_S, RateWindow
from llmrun_runtime.wire.reports import LocalUsage, RemoteUsage, Subject, key_subject, model_subject
from llmrun_runtime.wire.routing_table import ModelRoute

CONCURRENCY_RETRY_S = 1
# A client that closes a stream and asks again at once is faster than the news of the close.
PLACE_WAIT_S = 0.1
_NO_USAGE = RemoteUsage()


@dataclass(frozen=True)
class Limit:
    """The limits of one key or model; 0 is no limit."""

    subject: Subject
    label: str
    """The subject's name in error messages."""
    rpm: int = 0
    tpm: int = 0
    max_in_flight: int = 0

    @property
    def limits(self) -> bool:
        """Whether there is any."""
        return bool(self.rpm or self.tpm or self.max_in_flight)


def key_limits(key: KeyInfo | None) -> list[Limit]:
    """Return the limits of a key, which apply before the request's body is read."""
    if not key:
        return []
    limit = Limit(key_subject(key.name), f"key {key.name}", key.rpm, key.tpm, key.max_in_flight)
    return [limit] if limit.limits else []


def model_limits(model: ModelRoute) -> list[Limit]:
    """Return the limits of a model."""
    limit = Limit(model_subject(model.name), f"model {model.name}", model.rpm, model.tpm, model.max_in_flight)
    return [limit] if limit.limits else []


def output_cap(key: KeyInfo | None, model: ModelRoute) -> OutputCap | None:
    """Return the smaller of the caps on a request's output; None if there is none."""
    caps = [OutputCap(model.max_output_tokens, f"model {model.name}")]
    if key:
        caps.append(OutputCap(key.max_output_tokens, f"key {key.name}"))
    return min((cap for cap in caps if cap.tokens), key=lambda cap: cap.tokens, default=None)


class Limiter:
    """Counts the requests of each subject at this ingress and enforces limits."""

    def __init__(self) -> None:
        self._remote: Mapping[Subject, RemoteUsage] = {}
        self._remote_since = 0.0
        self._requests: dict[Subject, RateWindow] = {}
        self._in_flight: Counter[Subject] = Counter()
        self._reserved: Counter[Subject] = Counter()
        """The tokens that requests in flight may still generate."""
        self._released = asyncio.Event()
        """Set when a request ends."""

    def set_remote(self, usage: Mapping[Subject, RemoteUsage], now: float) -> None:
        """Store the usage at other ingresses and of tokens, as control reports it."""
        self._remote, self._remote_since = usage, now
        self._released.set()

    def usage(self, now: float) -> dict[Subject, LocalUsage]:
        """Return the usage of subjects with limits at this ingress, for control."""
        self._requests = {subject: window for subject, window in self._requests.items() if window.total(now)}
        self._in_flight = +self._in_flight  # without the subjects at zero
        self._reserved = +self._reserved
        subjects = self._requests.keys() | self._in_flight.keys() | self._reserved.keys()
        return {s: LocalUsage(self._local_requests(s, now), self._in_flight[s], self._reserved[s]) for s in subjects}

    async def wait_for_place(self, limits: Sequence[Limit]) -> None:
        """Return when `max_in_flight` admits another request, at the latest after PLACE_WAIT_S."""
        if not any(limit.max_in_flight for limit in limits):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PLACE_WAIT_S):
                while any(self._is_full(limit, time.monotonic()) for limit in limits):
                    self._released.clear()
                    await self._released.wait()

    def _is_full(self, limit: Limit, now: float) -> bool:
        remote = self._usage_elsewhere(limit.subject, now)
        return bool(limit.max_in_flight) and self._in_flight[limit.subject] + remote.in_flight >= limit.max_in_flight

    @contextlib.contextmanager
    def acquire(self, limits: Sequence[Limit], now: float) -> Iterator[None]:
        """Count a request while the block runs. Raises HTTPError (429) if a limit is reached.

        1. Concurrent requests.
        2. Requests in the last minute, also those that were refused after they had been counted.
        3. Tokens in the last minute.
        """
        for limit in limits:
            remote = self._usage_elsewhere(limit.subject, now)
            # 1.
            if self._is_full(limit, now):
                concurrent = _count(limit.max_in_flight, "concurrent request")
                raise _limit_reached(limit, f"{concurrent} (max_in_flight)", CONCURRENCY_RETRY_S)
            # 2.
            if limit.rpm and self._local_requests(limit.subject, now) + remote.requests >= limit.rpm:
                window = self._requests.get(limit.subject)
                wait = window.wait(now, max(1, limit.rpm - remote.requests)) if window else CONCURRENCY_RETRY_S
                raise _limit_reached(limit, f"{_count(limit.rpm, 'request')} per minute (rpm)", wait)
            # 3.
            self._check_tokens(limit, remote, 0)
        for limit in limits:
            self._in_flight[limit.subject] += 1
            self._requests.setdefault(limit.subject, RateWindow()).add(now)
        try:
            yield
        finally:
            for limit in limits:
                self._in_flight[limit.subject] -= 1
            self._released.set()

    @contextlib.contextmanager
    def reserve(self, limits: Sequence[Limit], now: float, output_tokens: int) -> Iterator[None]:
        """Reserve the tokens that a request may generate while the block runs.

        Raises HTTPError (429) if a limit would be exceeded by them and by those that others in flight may generate.
        """
        for limit in limits:
            self._check_tokens(limit, self._usage_elsewhere(limit.subject, now), output_tokens)
        for limit in limits:
            self._reserved[limit.subject] += output_tokens
        try:
            yield
        finally:
            for limit in limits:
                self._reserved[limit.subject] -= output_tokens

    def _check_tokens(self, limit: Limit, remote: RemoteUsage, output_tokens: int) -> None:
        reserved = self._reserved[limit.subject] + remote.reserved + output_tokens
        if limit.tpm and (remote.tokens >= limit.tpm or remote.tokens + reserved > limit.tpm):
            tokens = f"{_count(limit.tpm, 'token')} per minute (tpm), {remote.tokens} used"
            if reserved:
                tokens += f", {reserved} more if this request and those in flight use their max_tokens"
            raise _limit_reached(limit, tokens, remote.tokens_wait)

    def headers(self, limits: Sequence[Limit], now: float) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's `x-ratelimit-*` headers, each kind for the limit with the least remaining."""
        requests = [self._remaining_requests(limit.subject, limit.rpm, now) for limit in limits if limit.rpm]
        tokens = [self._remaining_tokens(limit.subject, limit.tpm, now) for limit in limits if limit.tpm]
        headers: list[tuple[bytes, bytes]] = []
        for kind, rows in (("requests", requests), ("tokens", tokens)):
            if rows:
                remaining, limit, reset = min(rows)
                values = {"limit": str(limit), "remaining": str(remaining), "reset": f"{reset:.3g}s"}
                headers += [(f"x-ratelimit-{name}-{kind}".encode(), value.encode()) for name, value in values.items()]
        return headers

    def _local_requests(self, subject: Subject, now: float) -> int:
        window = self._requests.get(subject)
        return window.total(now) if window else 0

    def _usage_elsewhere(self, subject: Subject, now: float) -> RemoteUsage:
        """Return what control reported last, unless control has been away for longer than it counts."""
        return self._remote.get(subject, _NO_USAGE) if now - self._remote_since < WINDOW_S else _NO_USAGE

    def _remaining_requests(self, subject: Subject, limit: int, now: float) -> tuple[int, int, float]:
        """Return the remaining requests, the limit, and the seconds until all of it is available again."""
        used = self._local_requests(subject, now) + self._usage_elsewhere(subject, now).requests
        window = self._requests.get(subject)
        return max(0, limit - used), limit, window.wait(now, 1) if window else 0

    def _remaining_tokens(self, subject: Subject, limit: int, now: float) -> tuple[int, int, float]:
        remote = self._usage_elsewhere(subject, now)
        return max(0, limit - remote.tokens), limit, remote.tokens_wait


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _limit_reached(limit: Limit, allowed: str, wait: float) -> HTTPError:
    message = f"rate limit reached: {limit.label} is limited to {allowed}"
    return HTTPError(429, message, "rate_limit_exceeded", "rate_limit_error", retry_after=max(1, math.ceil(wait)))
