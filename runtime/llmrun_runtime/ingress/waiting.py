"""Holds requests until their model has a replica with room: keeps the table and counts what waits and what flies.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from llmrun_runtime.ingress.admission import Refusal, find_model
from llmrun_runtime.ingress.routing import choose
from llmrun_runtime.reports import Traffic
from llmrun_runtime.table import ModelRoute, ReplicaRoute, Table

RETRY_AFTER_S = 10
AVOID_S = 1.0


@dataclass(frozen=True)
class Claim:
    """A replica that a request goes to, counted as in flight there until it is released."""

    model: str
    replica: ReplicaRoute
    waited: bool = False


class Waiting:
    """The ingress's table and counters."""

    def __init__(self, wake_timeout: float, on_wait: Callable[[], None]) -> None:
        self.table = Table()
        self.wake_timeout = wake_timeout
        self._on_wait = on_wait
        self._waiting: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        self._by_model: Counter[str] = Counter()
        self._by_replica: Counter[str] = Counter()
        self._first_tokens: dict[str, float] = {}
        self._changed = asyncio.Event()

    def update(self, table: Table) -> None:
        """Take a new table; whoever waits looks again."""
        self.table = table
        self._wake_all()

    def traffic(self) -> dict[str, Traffic]:
        """What waits and what is in flight, by model."""
        models = {*(+self._waiting), *(+self._by_model)}
        return {m: Traffic(self._waiting[m], self._by_model[m], self._since.get(m, 0)) for m in models}

    def first_tokens(self) -> dict[str, float]:
        """When (unix time) requests that had waited got their first bytes, by replica, since the last call."""
        found, self._first_tokens = self._first_tokens, {}
        return found

    def answered(self, claim: Claim) -> None:
        """A request has got its first byte."""
        if claim.waited and claim.replica.id not in self._first_tokens:
            self._first_tokens[claim.replica.id] = time.time()
            self._on_wait()

    @contextlib.contextmanager
    def in_flight(self, claim: Claim) -> Iterator[None]:
        """Count the claim while the request is at its replica."""
        self._by_model[claim.model] += 1
        self._by_replica[claim.replica.id] += 1
        try:
            yield
        finally:
            self._by_model[claim.model] -= 1
            self._by_replica[claim.replica.id] -= 1
            if not self._by_replica[claim.replica.id]:
                del self._by_replica[claim.replica.id]
            if self._waiting[claim.model]:
                self._wake_all()

    async def claim(self, name: str, deadline: float, avoid: Collection[str] = ()) -> Claim:
        """A replica for the model that clients call `name`, as soon as one has room.

        Replicas in `avoid` have just failed this request: they are taken again after AVOID_S, if they are still in
        the table and there is no other. Raises Refusal: the model is gone, its start fails while we wait, or
        `deadline` (of the event loop's clock) is over.
        """
        model = find_model(self.table, name)
        if replica := choose(model, self._by_replica, avoid):
            return Claim(model.name, replica)
        counted, failures = model.name, model.failures
        loop = asyncio.get_running_loop()
        forgive = loop.time() + AVOID_S
        self._waiting[counted] += 1
        self._since.setdefault(counted, time.time())
        self._on_wait()
        try:
            while True:
                now = loop.time()
                if not model.replicas and (model.paused or model.failures > failures):
                    text = f"{model.name} did not start: {model.cause}"
                    raise Refusal(503, text, "model_failed", "service_unavailable", retry_after=RETRY_AFTER_S)
                if now >= deadline:
                    raise _too_late(model, self.wake_timeout)
                with contextlib.suppress(TimeoutError):
                    until = min(deadline, forgive) if avoid and now < forgive else deadline
                    await asyncio.wait_for(self._changed.wait(), until - now)
                model = find_model(self.table, name)
                failures = min(failures, model.failures)
                if replica := choose(model, self._by_replica, avoid if loop.time() < forgive else ()):
                    return Claim(model.name, replica, waited=True)
        finally:
            self._waiting[counted] -= 1
            if not self._waiting[counted]:
                del self._since[counted]
            self._on_wait()

    def _wake_all(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _too_late(model: ModelRoute, limit: float) -> Refusal:
    what = "had no room" if model.replicas else "was not ready"
    why = f": {model.cause}" if model.cause else ""
    text = f"{model.name} {what} within {limit:g} s{why}"
    return Refusal(503, text, "model_not_ready", "service_unavailable", retry_after=RETRY_AFTER_S)
