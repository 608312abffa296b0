"""Holds requests until their model has a replica with room: keeps the table and counts what waits and what flies.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from llmrun_runtime.ingress.admission.admit import find_model
from llmrun_runtime.ingress.errors import NOT_READY, HTTPError
from llmrun_runtime.ingress.routing import choose
from llmrun_runtime.wire.reports import Traffic
from llmrun_runtime.wire.routing_table import ModelRoute, ReplicaRoute, Table

RETRY_AFTER_S, MOST_RETRY_AFTER_S = 10, 120
# A caller who did not want to wait will come back: for so much longer than is usual the wake goes on for it.
HOLD_FACTOR = 2
AVOID_S = 1.0


@dataclass(frozen=True)
class Caller:
    """Whose request it is, as far as waiting and routing go."""

    key: str = ""
    """The name of its key; "" without one."""
    probe: bool = False
    """It does not keep a model hot."""
    prefix: bytes = b""
    """How its prompt begins."""
    adapter: str = ""
    """The pin of the adapter that it asks for."""
    counted: str = ""
    """How that adapter is called in metrics."""


NOBODY = Caller()


@dataclass(frozen=True)
class Claim:
    """A replica that a request goes to, counted as in flight there until it is released."""

    model: str
    replica: ReplicaRoute
    caller: Caller
    waited: bool = False


# Who waits in the place of a caller who would not. No key is called so; it takes no place in the queue from anybody.
STAND_IN = Caller(key="\0")


@dataclass(eq=False)
class Waiter:
    """One request that waits. Its turn is a claim, or None: look again at what has changed."""

    caller: Caller
    avoid: Collection[str]
    turn: asyncio.Future[Claim | None]


class RequestQueue:
    """The ingress's table and counters."""

    def __init__(self, wake_timeout: float, on_wait: Callable[[], None]) -> None:
        self.table = Table()
        self.wake_timeout = wake_timeout
        self._on_wait = on_wait
        self._queues: dict[str, dict[str, deque[Waiter]]] = {}
        """By model and key."""
        self._since: dict[str, float] = {}
        self._held: dict[str, asyncio.Task[None]] = {}
        self._by_model: Counter[str] = Counter()
        self._by_replica: Counter[str] = Counter()
        self._by_key: Counter[tuple[str, str]] = Counter()
        self._by_adapter: Counter[tuple[str, str]] = Counter()
        self._first_tokens: dict[str, float] = {}

    def update(self, table: Table) -> None:
        """Take a new table; whoever waits looks again."""
        self.table = table
        for model, queue in self._queues.items():
            self._serve(model)
            for waiter in (waiter for waiters in queue.values() for waiter in waiters):
                if not waiter.turn.done():
                    waiter.turn.set_result(None)

    def traffic(self) -> dict[str, Traffic]:
        """What waits and what is in flight, by model; probes are not counted."""
        models = {*self._queues, *(+self._by_model)}
        return {m: Traffic(self._waiting(m), self._by_model[m], self._since.get(m, 0)) for m in models}

    def by_adapter(self) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
        """What waits and what is in flight, probes too, by model and by what the adapter is called in metrics."""
        waiting = Counter(
            (model, waiter.caller.counted)
            for model, queue in self._queues.items()
            for waiters in queue.values()
            for waiter in waiters
        )
        return waiting, self._by_adapter.copy()

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
        """Count the claim's request as in flight no more; its place goes to the next who waits."""
        self._count(claim, -1)
        self._serve(claim.model)

    def _waiting(self, model: str) -> int:
        return sum(map(len, self._queues.get(model, {}).values()))

    def _count(self, claim: Claim, change: int) -> None:
        replica, key = claim.replica.id, (claim.model, claim.caller.key)
        adapter = (claim.model, claim.caller.counted)
        self._by_model[claim.model] += 0 if claim.caller.probe else change
        self._by_replica[replica] += change
        self._by_key[key] += change
        self._by_adapter[adapter] += change
        if not self._by_replica[replica]:
            del self._by_replica[replica]
        if not self._by_key[key]:
            del self._by_key[key]
        if not self._by_adapter[adapter]:
            del self._by_adapter[adapter]

    def _take(self, model: ModelRoute, avoid: Collection[str], caller: Caller, *, waited: bool) -> Claim | None:
        """Claim a replica that has room, if there is one, and count it in the same step: nobody else gets its place."""
        replica = choose(model, self._by_replica, avoid, caller.prefix, caller.adapter)
        if not replica:
            return None
        claim = Claim(model.name, replica, caller, waited)
        self._count(claim, 1)
        return claim

    def _serve(self, name: str) -> None:
        """Give places to those who wait: the key with the fewest requests in flight comes first, and of it the first.

        So whoever floods a model with requests does not make others wait behind all of them.
        """
        model = self.table.models.get(name)
        queue = self._queues.get(name, {})
        waiting = {key: deque(w for w in waiters if not w.turn.done()) for key, waiters in queue.items()}
        while model and (keys := [key for key, waiters in waiting.items() if waiters]):
            key = min(keys, key=lambda key: self._by_key[name, key])
            waiter = waiting[key].popleft()
            claim = self._take(model, waiter.avoid, waiter.caller, waited=True)
            if claim:
                waiter.turn.set_result(claim)
            elif not waiter.avoid:
                return

    def _full(self, model: ModelRoute, caller: Caller) -> int:
        """How many wait, if the caller may not wait beside them; else 0. A key has its share whatever others do."""
        lengths = {key: len(waiters) for key, waiters in self._queues.get(model.name, {}).items()}
        lengths.pop(STAND_IN.key, None)
        queued = sum(lengths.values())
        share = max(1, model.max_queued // len(lengths.keys() | {caller.key}))
        return queued if queued >= model.max_queued and lengths.get(caller.key, 0) >= share else 0

    async def claim(
        self,
        name: str,
        deadline: float,
        avoid: Collection[str] = (),
        began: float | None = None,
        caller: Caller = NOBODY,
    ) -> Claim:
        """A replica for the model that clients call `name`, as soon as one has room; `release` it afterwards.

        Replicas in `avoid` have just failed this request: they are taken again after AVOID_S, if they are still in
        the table and there is no other. Raises Refusal: the model is gone, its start fails while we wait, or
        `deadline` (of the event loop's clock) is over; `began`, of the same, is when the caller came.
        """
        model = find_model(self.table, name)
        if not self._queues.get(model.name) and (claim := self._take(model, avoid, caller, waited=False)):
            return claim
        queued = self._full(model, caller)
        if queued and not avoid:  # who has been let in once stays
            text = f"{queued} requests wait for {model.name} already (max_queued)"
            raise HTTPError(429, text, "queue_full", "rate_limit_error", retry_after=retry_after(model))
        counted, failures = model.name, model.failures
        loop = asyncio.get_running_loop()
        began = loop.time() if began is None else began
        forgive = loop.time() + AVOID_S
        with self._queued(counted, Waiter(caller, avoid, loop.create_future())) as waiter:
            while model.name == counted:
                now = loop.time()
                if now >= forgive:
                    waiter.avoid = ()
                self._serve(counted)
                if waiter.turn.done() and (claim := waiter.turn.result()):
                    return claim
                if not model.replicas and (model.paused or model.failures > failures):
                    text = f"{model.name} did not start: {model.cause}"
                    raise HTTPError(503, text, "model_failed", "service_unavailable", retry_after=retry_after(model))
                if now >= deadline:
                    raise _too_late(model, deadline - began)
                until = min(deadline, forgive) if waiter.avoid else deadline
                await asyncio.wait({waiter.turn}, timeout=until - now if until < math.inf else None)
                if waiter.turn.done() and not waiter.turn.result():
                    waiter.turn = loop.create_future()
                    model = find_model(self.table, name)
                    failures = min(failures, model.failures)
        # The name means another model by now.
        return await self.claim(name, deadline, avoid, began, caller)

    @contextlib.contextmanager
    def _queued(self, model: str, waiter: Waiter) -> Iterator[Waiter]:
        """Stand in the model's queue meanwhile."""
        queue = self._queues.setdefault(model, {})
        waiters = queue.setdefault(waiter.caller.key, deque())
        waiters.append(waiter)
        self._since.setdefault(model, time.time())
        self._on_wait()
        try:
            yield waiter
        except BaseException:
            if waiter.turn.done() and (claim := waiter.turn.result()):
                self._count(claim, -1)  # it came in the moment in which we left
            raise
        finally:
            waiters.remove(waiter)
            if not waiters:
                del queue[waiter.caller.key]
            if not queue:
                del self._queues[model], self._since[model]
            self._serve(model)
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
                self.release(await self.claim(model.name, float("inf"), avoid=("",), caller=STAND_IN))
        except (HTTPError, TimeoutError):
            return  # whoever comes back hears it
        finally:
            del self._held[model.name]


def retry_after(model: ModelRoute, waited: float = 0) -> int:
    """Whole seconds after which a caller may hope to be served, as the model's earlier starts took."""
    return math.ceil(min(max(1, (model.usual_start or RETRY_AFTER_S) - waited), MOST_RETRY_AFTER_S))


def _too_late(model: ModelRoute, waited: float) -> HTTPError:
    what = "had no room" if model.replicas else "was not ready"
    why = f": {model.cause or model.phase}" if model.cause or model.phase else ""
    text = f"{model.name} {what} within {waited:.3g} s{why}" if waited > 0.05 else f"{model.name} is not ready{why}"
    return HTTPError(503, text, NOT_READY, "service_unavailable", retry_after=retry_after(model, waited))
