"""Holds requests until their model has a replica with room: keeps the table and counts what waits and what flies.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from llmrun_runtime.ingress.admission import Refusal, find_model
from llmrun_runtime.ingress.routing import choose
from llmrun_runtime.reports import Traffic
from llmrun_runtime.table import ModelRoute, ReplicaRoute, Table

RETRY_AFTER_S, MOST_RETRY_AFTER_S = 10, 120
# A caller who did not want to wait will come back: for so much longer than is usual the wake goes on for it.
HOLD_FACTOR = 2
AVOID_S = 1.0
NOT_READY = "model_not_ready"


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
        self._held: dict[str, asyncio.Task[None]] = {}
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
        """Release the claim when the request has left its replica."""
        try:
            yield
        finally:
            self.release(claim)

    def release(self, claim: Claim) -> None:
        """Count the claim's request as in flight no more."""
        self._by_model[claim.model] -= 1
        self._by_replica[claim.replica.id] -= 1
        if not self._by_replica[claim.replica.id]:
            del self._by_replica[claim.replica.id]
        if self._waiting[claim.model]:
            self._wake_all()

    def _take(self, model: ModelRoute, avoid: Collection[str], *, waited: bool) -> Claim | None:
        """Claim a replica that has room, if there is one, and count it in the same step: nobody else gets its place."""
        replica = choose(model, self._by_replica, avoid)
        if not replica:
            return None
        self._by_model[model.name] += 1
        self._by_replica[replica.id] += 1
        return Claim(model.name, replica, waited)

    async def claim(self, name: str, deadline: float, avoid: Collection[str] = (), began: float | None = None) -> Claim:
        """A replica for the model that clients call `name`, as soon as one has room; `release` it afterwards.

        Replicas in `avoid` have just failed this request: they are taken again after AVOID_S, if they are still in
        the table and there is no other. Raises Refusal: the model is gone, its start fails while we wait, or
        `deadline` (of the event loop's clock) is over; `began`, of the same, is when the caller came.
        """
        model = find_model(self.table, name)
        if claim := self._take(model, avoid, waited=False):
            return claim
        queued = self._waiting[model.name] - (model.name in self._held)
        if queued >= model.max_queued and not avoid:  # who has been let in once stays
            text = f"{queued} requests wait for {model.name} already (max_queued)"
            raise Refusal(429, text, "queue_full", "rate_limit_error", retry_after=retry_after(model))
        counted, failures = model.name, model.failures
        loop = asyncio.get_running_loop()
        began = loop.time() if began is None else began
        forgive = loop.time() + AVOID_S
        self._waiting[counted] += 1
        self._since.setdefault(counted, time.time())
        self._on_wait()
        try:
            while True:
                now = loop.time()
                if not model.replicas and (model.paused or model.failures > failures):
                    text = f"{model.name} did not start: {model.cause}"
                    raise Refusal(503, text, "model_failed", "service_unavailable", retry_after=retry_after(model))
                if now >= deadline:
                    raise _too_late(model, now - began)
                with contextlib.suppress(TimeoutError):
                    until = min(deadline, forgive) if avoid and now < forgive else deadline
                    await asyncio.wait_for(self._changed.wait(), until - now)
                model = find_model(self.table, name)
                failures = min(failures, model.failures)
                if claim := self._take(model, avoid if loop.time() < forgive else (), waited=True):
                    return claim
        finally:
            self._waiting[counted] -= 1
            if not self._waiting[counted]:
                del self._since[counted]
            self._on_wait()

    def describe(self, name: str, waited: float) -> str:
        """What whoever has waited for that name for so many seconds can be told."""
        model = find_model(self.table, name)
        what = f"waking {model.name}" if not model.replicas else f"queued for {model.name}"
        return ", ".join(filter(None, [what, f"{waited:.0f} s", model.phase]))

    async def close(self) -> None:
        """Let go of the wakes that are held for callers to come."""
        held = list(self._held.values())
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)

    def hold(self, name: str) -> None:
        """Go on waiting for a while in the place of a caller who would not: it will come back."""
        model = find_model(self.table, name)
        if not model.replicas and model.name not in self._held:
            self._held[model.name] = asyncio.get_running_loop().create_task(self._stand_in(model))

    async def _stand_in(self, model: ModelRoute) -> None:
        limit = HOLD_FACTOR * max(model.usual_start, RETRY_AFTER_S) + RETRY_AFTER_S
        try:
            async with asyncio.timeout(limit):
                self.release(await self.claim(model.name, float("inf"), avoid=("",)))
        except (Refusal, TimeoutError):
            return  # whoever comes back hears it
        finally:
            del self._held[model.name]

    def _wake_all(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def retry_after(model: ModelRoute, waited: float = 0) -> int:
    """Whole seconds after which a caller may hope to be served, as the model's earlier starts took."""
    return math.ceil(min(max(1, (model.usual_start or RETRY_AFTER_S) - waited), MOST_RETRY_AFTER_S))


def _too_late(model: ModelRoute, waited: float) -> Refusal:
    what = "had no room" if model.replicas else "was not ready"
    why = f": {model.cause or model.phase}" if model.cause or model.phase else ""
    text = f"{model.name} {what} within {waited:.3g} s{why}" if waited > 0.05 else f"{model.name} is not ready{why}"
    return Refusal(503, text, NOT_READY, "service_unavailable", retry_after=retry_after(model, waited))
