"""Limits per minute and at once, of keys and of models. In memory; the clock is an argument."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmrun.wire import KeyInfo
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.rate_window import RateWindow
from llmrun_runtime.wire.reports import LocalUsage, RemoteUsage, Subject, key_subject, model_subject
from llmrun_runtime.wire.routing_table import ModelRoute

AT_ONCE_RETRY_S = 1


@dataclass(frozen=True)
class Limit:
    """One subject's limits; 0 is none."""

    subject: Subject
    who: str
    """In words, for who is refused."""
    rpm: int = 0
    tpm: int = 0
    max_in_flight: int = 0


def limits_of(key: KeyInfo | None, model: ModelRoute) -> list[Limit]:
    """Those that a request for `model` with `key` has to keep."""
    found = [Limit(model_subject(model.name), f"the model {model.name}", model.rpm, model.tpm, model.max_in_flight)]
    if key:
        found.insert(0, Limit(key_subject(key.name), f"the key {key.name}", key.rpm, key.tpm, key.max_in_flight))
    return [limit for limit in found if limit.rpm or limit.tpm or limit.max_in_flight]


class Limiter:
    """What each subject has asked here, and, as control tells, elsewhere."""

    def __init__(self) -> None:
        self.elsewhere: Mapping[Subject, RemoteUsage] = {}
        self._requests: dict[Subject, RateWindow] = {}
        self._in_flight: Counter[Subject] = Counter()

    def spent(self, now: float) -> dict[Subject, LocalUsage]:
        """For control: what those with limits have asked here."""
        self._requests = {subject: window for subject, window in self._requests.items() if window.total(now)}
        subjects = self._requests.keys() | (+self._in_flight).keys()
        return {s: LocalUsage(self._asked(s, now), self._in_flight[s]) for s in subjects}

    @contextlib.contextmanager
    def entered(self, limits: Sequence[Limit], now: float) -> Iterator[None]:
        """Count a request, from its admission to its end. Raises Refusal (429) if one of the limits is reached.

        1. Requests at once.
        2. Requests in the last minute.
        3. Tokens in the last minute: those of earlier requests; what this one will use nobody knows.
        """
        for limit in limits:
            there = self.elsewhere.get(limit.subject, RemoteUsage())
            # 1.
            if limit.max_in_flight and self._in_flight[limit.subject] + there.in_flight >= limit.max_in_flight:
                text = f"{limit.who} has {limit.max_in_flight} requests at once already (max_in_flight)"
                raise _over(text, AT_ONCE_RETRY_S)
            # 2.
            if limit.rpm and self._asked(limit.subject, now) + there.requests >= limit.rpm:
                window = self._requests.get(limit.subject)
                wait = window.wait(now, max(1, limit.rpm - there.requests)) if window else AT_ONCE_RETRY_S
                raise _over(f"{limit.who} has had {limit.rpm} requests in the last minute (rpm)", wait)
            # 3.
            if limit.tpm and there.tokens >= limit.tpm:
                raise _over(
                    f"{limit.who} has used {there.tokens} of {limit.tpm} tokens a minute (tpm)", there.tokens_wait
                )
        for limit in limits:
            self._in_flight[limit.subject] += 1
            self._requests.setdefault(limit.subject, RateWindow()).add(now)
        try:
            yield
        finally:
            for limit in limits:
                self._in_flight[limit.subject] -= 1

    def headers(self, limits: Sequence[Limit], now: float) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*`: of requests and of tokens, the limit with the least left."""
        found: list[tuple[bytes, bytes]] = []
        kinds = {
            "requests": [self._left(limit.subject, limit.rpm, now) for limit in limits if limit.rpm],
            "tokens": [self._left_tokens(limit.subject, limit.tpm) for limit in limits if limit.tpm],
        }
        for kind, rows in kinds.items():
            if rows:
                left, limit, reset = min(rows)
                values = {"limit": str(limit), "remaining": str(left), "reset": f"{reset:.3g}s"}
                found += [(f"x-ratelimit-{name}-{kind}".encode(), value.encode()) for name, value in values.items()]
        return found

    def _asked(self, subject: Subject, now: float) -> int:
        window = self._requests.get(subject)
        return window.total(now) if window else 0

    def _left(self, subject: Subject, limit: int, now: float) -> tuple[int, int, float]:
        """What is left, the limit, seconds until all of it is there again."""
        asked = self._asked(subject, now) + self.elsewhere.get(subject, RemoteUsage()).requests
        window = self._requests.get(subject)
        return max(0, limit - asked), limit, window.wait(now, 1) if window else 0

    def _left_tokens(self, subject: Subject, limit: int) -> tuple[int, int, float]:
        there = self.elsewhere.get(subject, RemoteUsage())
        return max(0, limit - there.tokens), limit, there.tokens_wait


def _over(text: str, wait: float) -> HTTPError:
    return HTTPError(429, text, "rate_limit_exceeded", "rate_limit_error", retry_after=max(1, math.ceil(wait)))
