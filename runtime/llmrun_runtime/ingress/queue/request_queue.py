"""Queues requests until their model has a replica with a free slot. Holds the routing table; does not know HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator

from llmrun_runtime.ingress.admission.target import find_model
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.queue.claim import ANONYMOUS, PLACEHOLDER, Caller, Claim, Waiter, WaitLimit
from llmrun_runtime.ingress.queue.in_flight import InFlight
from llmrun_runtime.ingress.queue.wait_errors import (
    DEFAULT_RETRY_AFTER_S,
    queue_full,
    shutting_down,
    start_failed,
    wait_timed_out,
)
from llmrun_runtime.ingress.routing import choose
from llmrun_runtime.wire.reports import Traffic
from llmrun_runtime.wire.routing_table import ModelRoute, Table

# A wake continues for this multiple of the usual start time after a client gave up, because the client will retry.
HOLD_FACTOR = 2
AVOID_S = 1.0


class RequestQueue:
    """The routing table, the queues and the counters of one ingress.

    `on_change` is called when control should get a new report.
    """

    def __init__(self, wake_timeout: float, on_change: Callable[[], None]) -> None:
        self.table = Table()
        self.wake_timeout = wake_timeout
        self.in_flight = InFlight()
        self.draining = False
        """Whether requests without a replica are refused, because this ingress stops."""
        self._on_change = on_change
        self._queues: dict[str, dict[str, deque[Waiter]]] = {}
        """By model and key."""
        self._waiting_since: dict[str, float] = {}
        self._held_wakes: dict[str, asyncio.Task[None]] = {}
        self._first_tokens: dict[str, float] = {}

    def update(self, table: Table) -> None:
        """Replace the routing table."""
        self.table = table
        self._wake_waiters()

    def drain(self) -> None:
        """Refuse waiting and new requests; those in flight continue."""
        self.draining = True
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        """Let all waiters check the table and `draining`."""
        for model, queue in self._queues.items():
            self._serve(model)
            for waiter in (waiter for waiters in queue.values() for waiter in waiters):
                if not waiter.turn.done():
                    waiter.turn.set_result(None)

    def traffic(self) -> dict[str, Traffic]:
        """Return the waiting and in-flight requests by model, without probes in flight."""
        in_flight = self.in_flight.by_model
        models = {*self._queues, *(+in_flight)}
        return {m: Traffic(self._waiting(m), in_flight[m], self._waiting_since.get(m, 0)) for m in models}

    def by_adapter(self) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
        """Return the waiting and in-flight requests, with probes, by model and the adapter's label in metrics."""
        waiting = Counter(
            (model, waiter.caller.adapter_label)
            for model, queue in self._queues.items()
            for waiters in queue.values()
            for waiter in waiters
        )
        return waiting, self.in_flight.by_adapter.copy()

    def first_tokens(self) -> dict[str, float]:
        """Return, by replica, when (Unix time) a request that had waited got its first byte; since the last call."""
        first_tokens, self._first_tokens = self._first_tokens, {}
        return first_tokens

    def on_first_byte(self, claim: Claim) -> None:
        """Record that a request has received its first byte."""
        if claim.waited and claim.replica.id not in self._first_tokens:
            self._first_tokens[claim.replica.id] = time.time()
            self._on_change()

    @contextlib.contextmanager
    def releasing(self, claim: Claim) -> Iterator[None]:
        """Release the claim at the end of the block."""
        try:
            yield
        finally:
            self.release(claim)

    def release(self, claim: Claim) -> None:
        """Stop counting the request as in flight and give its slot to the next waiter."""
        self.in_flight.add(claim, -1)
        self._serve(claim.model)

    def _waiting(self, model: str) -> int:
        return sum(map(len, self._queues.get(model, {}).values()))

    def _take(self, model: ModelRoute, avoid: Collection[str], caller: Caller, *, waited: bool) -> Claim | None:
        """Claim a slot if one is free, and count it in the same step so that no other request gets it."""
        replica = choose(model, self.in_flight.by_replica, avoid, caller.prefix, caller.adapter)
        if not replica:
            return None
        claim = Claim(model.name, replica, caller, waited)
        self.in_flight.add(claim, 1)
        return claim

    def _serve(self, name: str) -> None:
        """Give free slots to waiters: first to the key with the fewest requests in flight, oldest request first.

        So a key that floods a model does not delay the requests of others.
        """
        model = self.table.models.get(name)
        queue = self._queues.get(name, {})
        waiting = {key: deque(w for w in waiters if not w.turn.done()) for key, waiters in queue.items()}
        while model and (keys := [key for key, waiters in waiting.items() if waiters]):
            key = min(keys, key=lambda key: self.in_flight.by_key[name, key])
            waiter = waiting[key].popleft()
            claim = self._take(model, waiter.avoid, waiter.caller, waited=True)
            if claim:
                waiter.turn.set_result(claim)
            elif not waiter.avoid:
                return

    def _full(self, model: ModelRoute, caller: Caller) -> int:
        """Return the queue's length if the caller cannot join it, else 0. Each key has its share of `max_queued`."""
        lengths = {key: len(waiters) for key, waiters in self._queues.get(model.name, {}).items()}
        lengths.pop(PLACEHOLDER.key, None)
        waiting = sum(lengths.values())
        share = max(1, model.max_queued // len(lengths.keys() | {caller.key}))
        return waiting if waiting >= model.max_queued and lengths.get(caller.key, 0) >= share else 0

    async def claim(
        self, name: str, limit: WaitLimit, avoid: Collection[str] = (), caller: Caller = ANONYMOUS
    ) -> Claim:
        """Return a slot at a replica of the model called `name`, once one is free; `release` it afterwards.

        Replicas in `avoid` have just failed this request: they are used again after AVOID_S if no other one is free.
        Raises HTTPError: the model was deleted, its start failed while waiting, the queue is full, `limit` is over, or
        the ingress is draining.
        """
        if self.draining:
            raise shutting_down()
        model = find_model(self.table, name)
        if not self._queues.get(model.name) and (claim := self._take(model, avoid, caller, waited=False)):
            return claim
        waiting = self._full(model, caller)
        if waiting and not avoid:  # a retry was admitted to the queue before
            raise queue_full(model, waiting)
        waited = await self._wait(model, name, limit, avoid, caller)
        return waited or await self.claim(name, limit, avoid, caller)

    async def _wait(
        self, model: ModelRoute, name: str, limit: WaitLimit, avoid: Collection[str], caller: Caller
    ) -> Claim | None:
        """Wait in the model's queue. Returns None when `name` becomes the name of another model. Raises HTTPError."""
        queued_for, failures = model.name, model.failures
        loop = asyncio.get_running_loop()
        avoid_until = loop.time() + AVOID_S
        with self._queued(queued_for, Waiter(caller, avoid, loop.create_future())) as waiter:
            while model.name == queued_for:
                if self.draining:
                    raise shutting_down()
                now = loop.time()
                if now >= avoid_until:
                    waiter.avoid = ()
                self._serve(queued_for)
                if waiter.turn.done() and (claim := waiter.turn.result()):
                    return claim
                if not model.replicas and (model.paused or model.failures > failures):
                    raise start_failed(model)
                if now >= limit.deadline:
                    raise wait_timed_out(model, limit.deadline - limit.started, limit.source)
                until = min(limit.deadline, avoid_until) if waiter.avoid else limit.deadline
                await asyncio.wait({waiter.turn}, timeout=until - now if until < math.inf else None)
                if waiter.turn.done() and not waiter.turn.result():
                    waiter.turn = loop.create_future()
                    model = find_model(self.table, name)
                    failures = min(failures, model.failures)
        return None

    @contextlib.contextmanager
    def _queued(self, model: str, waiter: Waiter) -> Iterator[Waiter]:
        """Keep the waiter in the model's queue during the block."""
        queue = self._queues.setdefault(model, {})
        waiters = queue.setdefault(waiter.caller.key, deque())
        waiters.append(waiter)
        self._waiting_since.setdefault(model, time.time())
        self._on_change()
        try:
            yield waiter
        except BaseException:
            if waiter.turn.done() and (claim := waiter.turn.result()):
                self.in_flight.add(claim, -1)  # granted at the moment the request was cancelled
            raise
        finally:
            waiters.remove(waiter)
            if not waiters:
                del queue[waiter.caller.key]
            if not queue:
                del self._queues[model], self._waiting_since[model]
            self._serve(model)
            self._on_change()

    def describe_wait(self, name: str, waited: float) -> str:
        """Return the progress of a wait of `waited` seconds, like `waking one, 14 s, loading weights`."""
        model = find_model(self.table, name)
        activity = f"waking {model.name}" if not model.replicas else f"queued for {model.name}"
        return ", ".join(filter(None, [activity, f"{waited:.0f} s", model.phase]))

    def hold_wake(self, name: str) -> None:
        """Keep the model waking for a while after a client gave up: it will retry."""
        model = find_model(self.table, name)
        if not model.replicas and model.name not in self._held_wakes:
            self._held_wakes[model.name] = asyncio.get_running_loop().create_task(self._hold(model))

    async def _hold(self, model: ModelRoute) -> None:
        duration = HOLD_FACTOR * max(model.usual_start, DEFAULT_RETRY_AFTER_S) + DEFAULT_RETRY_AFTER_S
        never = WaitLimit(0, math.inf)
        try:
            async with asyncio.timeout(duration):
                # `avoid` is not empty, so that a full queue does not refuse the placeholder.
                self.release(await self.claim(model.name, never, avoid=("",), caller=PLACEHOLDER))
        except (HTTPError, TimeoutError):
            return  # the client's next request gets the error
        finally:
            del self._held_wakes[model.name]

    async def close(self) -> None:
        """Cancel all held wakes."""
        held = list(self._held_wakes.values())
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
