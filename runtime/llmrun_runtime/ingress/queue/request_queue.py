"""Queues requests until their model has a replica with a free slot. Holds the routing table; does not know HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
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
# How long a replica that could not be reached gets requests only if no other one is free. It has the fewest in flight,
# so it would get all new ones until control removes it.
UNREACHABLE_S = 5.0


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
        self._queues: dict[str, dict[tuple[int, str], deque[Waiter]]] = {}
        """By model, then by priority and key; without empty ones."""
        self._numbers = itertools.count()
        self._waiting_since: dict[str, float] = {}
        self._held_wakes: dict[str, asyncio.Task[None]] = {}
        self._first_tokens: dict[str, float] = {}
        self._unreachable: dict[str, float] = {}
        """By replica, until when (monotonic)."""

    def update(self, table: Table) -> None:
        """Replace the routing table, and wake the waiters that can be served now, or that must fail."""
        before, self.table = self.table, table
        for model in [model for model in self._queues if table.models.get(model) != before.models.get(model)]:
            self._check_waiters(model)

    def drain(self) -> None:
        """Refuse waiting and new requests; those in flight continue."""
        self.draining = True
        for model in list(self._queues):
            self._check_waiters(model)

    def _check_waiters(self, model: str) -> None:
        self._serve(model)
        for waiters in list(self._queues.get(model, {}).values()):
            for waiter in list(waiters):
                self._check(model, waiter)

    def traffic(self) -> dict[str, Traffic]:
        """Return the waiting and in-flight requests by model, without probes in flight."""
        in_flight, recent = self.in_flight.by_model, self.in_flight.recent()
        models = {*self._queues, *(+in_flight), *recent}
        return {
            model: Traffic(
                waiting=self._waiting(model),
                in_flight=in_flight[model],
                since=self._waiting_since.get(model, 0),
                priority=self._top(model),
                in_flight_priority=self.in_flight.priority(model),
                recent=model in recent,
            )
            for model in models
        }

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

    def on_unreachable(self, claim: Claim) -> None:
        """Record that a request could not reach its replica."""
        now = time.monotonic()
        self._unreachable = {replica: until for replica, until in self._unreachable.items() if until > now}
        self._unreachable[claim.replica.id] = now + UNREACHABLE_S

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

    def _top(self, model: str) -> int:
        """Return the highest priority of the model's waiting requests."""
        return max((priority for priority, _ in self._queues.get(model, ())), default=ANONYMOUS.priority)

    def _take(self, model: ModelRoute, avoid: Collection[str], caller: Caller, *, waited: bool) -> Claim | None:
        """Claim a slot if one is free, and count it in the same step so that no other request gets it."""
        in_flight, replica = self.in_flight.by_replica, None
        if self._unreachable:
            now = time.monotonic()
            suspects = [replica for replica, until in self._unreachable.items() if until > now]
            replica = choose(model, in_flight, [*avoid, *suspects], caller.prefix, caller.adapter)
        replica = replica or choose(model, in_flight, avoid, caller.prefix, caller.adapter)
        if not replica:
            return None
        claim = Claim(model.name, replica, caller, waited)
        self.in_flight.add(claim, 1)
        return claim

    def _serve(self, name: str) -> None:
        """Give free slots to waiters.

        1. The highest priority first.
        2. Then the key with the fewest requests in flight, so that a key that floods a model does not delay others.
        3. Then the oldest request.
        """
        model = self.table.models.get(name)
        waiting = {group: iter(tuple(waiters)) for group, waiters in self._queues.get(name, {}).items()}
        while model and waiting and choose(model, self.in_flight.by_replica):
            group = min(waiting, key=lambda group: (-group[0], self.in_flight.by_key[name, group[1]]))
            waiter = next(waiting[group], None)
            if not waiter:
                del waiting[group]
            elif claim := self._take(model, waiter.avoid, waiter.caller, waited=True):
                self._leave(name, waiter)
                waiter.turn.set_result(claim)

    def _check(self, queued_for: str, waiter: Waiter) -> None:
        """Resolve the waiter's turn if its model is gone or failed to start, or if the ingress is draining."""
        try:
            if self.draining:
                raise shutting_down()
            model = find_model(self.table, waiter.name)
            if not model.replicas and (model.paused or model.failures > waiter.failures):
                raise start_failed(model)
        except HTTPError as error:
            self._leave(queued_for, waiter)
            waiter.turn.set_exception(error)
            return
        waiter.failures = min(waiter.failures, model.failures)
        if model.name != queued_for:
            self._leave(queued_for, waiter)
            waiter.turn.set_result(None)

    def _make_place(self, model: ModelRoute, caller: Caller) -> None:
        """Make place for the caller in a full queue. Raises HTTPError (429).

        1. It displaces the newest request of the lowest priority, if that is lower than its own.
        2. Otherwise it may exceed `max_queued` within its key's share, so that no key keeps the others out.
        """
        queue = self._queues.get(model.name, {})
        lengths: Counter[str] = Counter()
        for (_, key), waiters in queue.items():
            lengths[key] += len(waiters)
        del lengths[PLACEHOLDER.key]
        waiting = lengths.total()
        if waiting < model.max_queued:
            return
        # 1.
        newest = [waiters[-1] for (_, key), waiters in queue.items() if key != PLACEHOLDER.key]
        displaced = min(newest, key=lambda waiter: (waiter.caller.priority, -waiter.number), default=None)
        if displaced and displaced.caller.priority < caller.priority:
            self._leave(model.name, displaced)
            displaced.turn.set_exception(queue_full(model, waiting))
        # 2.
        elif lengths[caller.key] >= max(1, model.max_queued // len(lengths.keys() | {caller.key})):
            raise queue_full(model, waiting)

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
        if not avoid:  # a retry was admitted to the queue before
            self._make_place(model, caller)
        waited = await self._wait(model, name, limit, avoid, caller)
        return waited or await self.claim(name, limit, avoid, caller)

    async def _wait(
        self, model: ModelRoute, name: str, limit: WaitLimit, avoid: Collection[str], caller: Caller
    ) -> Claim | None:
        """Wait in the model's queue. Returns None when `name` becomes the name of another model. Raises HTTPError."""
        loop = asyncio.get_running_loop()
        avoid_until = loop.time() + AVOID_S
        waiter = Waiter(name, caller, avoid, model.failures, next(self._numbers), loop.create_future())
        with self._queued(model.name, waiter):
            self._check(model.name, waiter)
            while not waiter.turn.done():
                now = loop.time()
                if now >= avoid_until:
                    waiter.avoid = ()
                self._serve(model.name)
                if waiter.turn.done():
                    break
                if now >= limit.deadline:
                    raise wait_timed_out(find_model(self.table, name), limit.deadline - limit.started, limit.source)
                until = min(limit.deadline, avoid_until) if waiter.avoid else limit.deadline
                await asyncio.wait({waiter.turn}, timeout=until - now if until < math.inf else None)
            return waiter.turn.result()

    @contextlib.contextmanager
    def _queued(self, model: str, waiter: Waiter) -> Iterator[None]:
        """Keep the waiter in the model's queue during the block, unless it leaves before."""
        group = (waiter.caller.priority, waiter.caller.key)
        self._queues.setdefault(model, {}).setdefault(group, deque()).append(waiter)
        self._waiting_since.setdefault(model, time.time())
        self._on_change()
        try:
            yield
        except BaseException:
            turn = waiter.turn
            if turn.done() and not turn.exception() and (claim := turn.result()):
                self.in_flight.add(claim, -1)  # granted at the moment the request was cancelled
            raise
        finally:
            if not waiter.turn.done():
                self._leave(model, waiter)
            self._serve(model)
            self._on_change()

    def _leave(self, model: str, waiter: Waiter) -> None:
        """Remove the waiter from the model's queue."""
        group = (waiter.caller.priority, waiter.caller.key)
        queue = self._queues[model]
        queue[group].remove(waiter)
        if not queue[group]:
            del queue[group]
        if not queue:
            del self._queues[model], self._waiting_since[model]

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
