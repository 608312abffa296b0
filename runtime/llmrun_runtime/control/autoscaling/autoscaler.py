"""The autoscaling loop: applies the policy to each model, makes room, publishes the routing table.

The decision itself is `policy.decide`. A model that a deploy has locked keeps its target.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

import ray
from ray.serve.exceptions import RayServeException

from llmrun.errors import ClusterError, Refused
from llmrun.wire import ModelStatus, State
from llmrun_runtime.control.autoscaling.capacity import Capacity
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.autoscaling.model_state import ModelState
from llmrun_runtime.control.autoscaling.model_view import ModelView, unreadable_status
from llmrun_runtime.control.autoscaling.policy import Demand, Failure, ScalingLimits, decide
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.placement import Node
from llmrun_runtime.wire.reports import LEASE_S, ReplicaReport
from llmrun_runtime.wire.routing_table import ModelRoute, Table, by_names

log = logging.getLogger("llmrun.control")
TICK_S = 0.25
# Reports of hundreds of replicas must not make ticks run back to back.
MIN_TICK_S = 0.05
# Serve acts on a target within a second. If surplus replicas stay for this long, Serve did not receive the target.
SURPLUS_S = 10.0
# `llmrun warm` requests a replica for this long if there is not enough capacity.
WARM_S = 600.0
# Replicas report twice per second. After a restart, control waits this long for those that Serve runs.
FIRST_TABLE_S = 2.0
# After ticks have failed for this long, control says so to the ingresses.
FAILING_S = 10.0
# Ingresses receive a new table within milliseconds. A deploy does not wait longer for one that is stuck.
ROUTED_S = 2.0
# An engine that dies sooner after it was ready counts as a failed start.
STABLE_S = 300.0


class Autoscaler:
    """Sets the targets of all active versions, and builds the routing table."""

    def __init__(
        self,
        *,
        models: Models,
        serve_apps: ServeApps,
        registry: Registry,
        cold_starts: ColdStarts,
        keys: Keys,
        nodes: Callable[[], list[Node]],
        head: Callable[[], str],
        control: tuple[str, int],
    ) -> None:
        self.table = Table(epoch=uuid.uuid4().hex, control=control, admin=keys.admin_digest)
        self.on_proven: Callable[[Deployed], None] = lambda row: None
        """Called when an unproven version's first replica is ready."""
        self.on_wake: Callable[[Deployed], None] = lambda row: None
        """Called when a request raises a model's target from zero, and again when others have ended for its replica."""
        self.on_eviction: Callable[[frozenset[str]], None] = lambda nodes: None
        """Called with the ids of the nodes on which replicas begin to end for another model's."""
        self.on_error: Callable[[str], None] = lambda task: None
        """Called with "autoscaler" for each exception of a tick."""
        self.unreadable: dict[str, str] = {}
        """By name, the stored models that this release cannot read, with the cause."""
        self._models = models
        self._serve_apps = serve_apps
        self._registry = registry
        self._cold_starts = cold_starts
        self._keys = keys
        self._states: dict[str, ModelState] = {}
        self._capacity = Capacity(
            models=models, registry=registry, serve_apps=serve_apps, states=self._states, nodes=nodes, head=head
        )
        self._first_tick = 0.0
        self.failure = ""
        """Why the last tick failed for all models; "" if it did not."""
        self._failing_since = 0.0
        self._polled = asyncio.Condition()
        self._polls = (0, 0)
        """The current table's number, and how many calls of `watch` have had it."""
        self._kicked = asyncio.Event()
        self._urgent = asyncio.Event()
        self._table_changed = asyncio.Condition()

    def kick(self) -> None:
        """Run the next tick soon, see MIN_TICK_S."""
        self._kicked.set()

    def kick_now(self) -> None:
        """Run the next tick now: a client may already send requests that need the new table."""
        self._kicked.set()
        self._urgent.set()

    def activate(self, row: Deployed) -> None:
        """Make a version the active one. A new engine version starts with a clean state, without earlier failures."""
        previous = self._models.put(row)
        if not previous or previous.engine_version != row.engine_version:
            if previous:
                self._cold_starts.end(row.name, previous.engine_version, "withdrawn")
            self._states[row.name] = ModelState(low_since=time.monotonic())
        self._registry.mark_used(row.name, time.monotonic())
        self.kick_now()

    def remove(self, model: str) -> None:
        """Remove a model's active version."""
        self._models.remove(model)
        self._states.pop(model, None)
        self._registry.last_used.pop(model, None)
        self._cold_starts.forget(model)
        self.kick_now()

    def set_adapters(self, model: str, adapters: dict[str, str] | None, error: str = "") -> None:
        """Set a model's adapters: their pins by name; None if they could not be listed, because of `error`."""
        state = self._states.get(model)
        if state and (state.adapters, state.adapters_error) != (adapters, error):
            state.adapters, state.adapters_error = adapters, error
            self.kick_now()

    def replica_failed(self, report: ReplicaReport, cause: str, first_seen: float) -> None:
        """Count a failed start of the active version: waiting requests fail with `cause`, the model backs off.

        Replicas that started together fail together, and count as one failure; so does one that Serve started again
        before its target was lowered. `first_seen` is the time of the replica's first report (monotonic).
        """
        row = self._models.get(report.model)
        if not row or row.engine_version != report.version:
            return
        state = self._states[row.name]
        self._cold_starts.end(row.name, row.engine_version, "failed")
        last, now = state.failure, time.monotonic()
        if last and (first_seen < last.at or not self._serve_apps.target(row.name, row.engine_version)):
            log.warning("%s v%d: another replica of the same start failed: %s", row.name, row.version, cause)
            return
        state.bad_nodes.failed(report.node, report.host, cause, now)
        count = self._count_failure(state, cause, now)
        log.warning("%s v%d failed to start (%d in a row): %s", row.name, row.version, count, cause)

    def _count_failure(self, state: ModelState, cause: str, now: float) -> int:
        """Record a failure after those in a row before it. Return their number."""
        last = state.failure or state.past_failure
        state.failure = Failure(last.count + 1 if last else 1, cause, now)
        state.past_failure, state.warm_until = None, 0
        self.kick()
        return state.failure.count

    def replica_ready(self, report: ReplicaReport) -> None:
        """End the back-off of the replica's version. Its failures still count until a replica is stable."""
        row = self._models.get(report.model)
        if row and row.engine_version == report.version:
            state = self._states[row.name]
            state.past_failure = state.failure or state.past_failure
            state.failure, state.death, state.evicted, state.warm_until = None, "", "", 0
            state.bad_nodes.ready(report.node)
            self.kick_now()

    def engine_died(self, report: ReplicaReport, cause: str) -> None:
        """Record that a replica's engine died after it was ready.

        Within STABLE_S it counts as a failed start: the model backs off, instead of a restart without a pause. After
        that, Serve starts another replica.
        """
        row = self._models.get(report.model)
        log.warning("%s v%d: %s", report.model, report.version, cause)
        if not row or row.engine_version != report.version:
            return
        state, now = self._states[row.name], time.monotonic()
        state.death = cause
        ready_since = self._registry.ready_since.get(report.id, now)
        if now - ready_since >= STABLE_S:
            state.past_failure = None
        elif not state.failure or ready_since >= state.failure.at:  # not one of several that die together
            count = self._count_failure(state, cause, now)
            age = now - ready_since
            log.warning("%s v%d died %.0f s after it was ready (%d in a row)", row.name, row.version, age, count)

    def replica_hung(self, report: ReplicaReport, cause: str) -> None:
        """Record why a replica was ended. Serve starts another one."""
        row = self._models.get(report.model)
        if row and row.engine_version == report.version:
            self._states[row.name].death = cause

    def replica_stopped(self, report: ReplicaReport) -> None:
        """Forget the failures before a replica that has served requests until it was stopped."""
        row = self._models.get(report.model)
        if row and row.engine_version == report.version and report.id in self._registry.served:
            self._states[row.name].past_failure = None

    def warm(self, name: str) -> str:
        """Wake the model with that name or alias, as a request would. Return the model's name.

        Raises Refused if the model is not found or locked, or refuses requests after failed starts.
        """
        row = self._models.resolve_unlocked(name)
        state, now = self._states[row.name], time.monotonic()
        if state.failure and state.failure.refuses(now):
            raise Refused(f"{row.name} failed to start: {state.failure.cause}", 503)
        state.unloaded, state.warmed = False, True
        state.warm_until = 0 if self._registry.ready(row.name, row.engine_version) else now + WARM_S
        self._registry.mark_used(row.name, now)
        self.kick()
        return row.name

    def unload(self, name: str) -> str:
        """Scale the model with that name or alias to zero, until a request or `warm`. Return the model's name.

        Raises Refused if the model is not found or locked, or requests wait for it.
        """
        model = self._models.resolve_unlocked(name).name
        waiting = self._registry.waiting(model)
        if waiting:
            raise Refused(f"cannot unload {model}: {waiting} requests are waiting for it", 409)
        state = self._states[model]
        state.unloaded, state.warm_until = True, 0
        self.kick()
        return model

    async def watch(self, epoch: str, number: int, timeout: float) -> Table:
        """Return the table as soon as it differs from the one given, or unchanged after `timeout` seconds.

        Raises TimeoutError if there is no complete table by then: an ingress keeps the table of an earlier control.
        Raises ClusterError if ticks have failed for FAILING_S: the table is old then, and ingresses are not ready.
        """
        await self._note_poll(epoch, number)
        async with self._table_changed:
            if not self.table.number:
                try:
                    async with asyncio.timeout(timeout):
                        await self._table_changed.wait_for(lambda: self.table.number)
                except TimeoutError:
                    self._check_ticks()
                    raise
            if (self.table.epoch, self.table.number) == (epoch, number):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        await self._table_changed.wait()
            if (self.table.epoch, self.table.number) == (epoch, number):
                self._check_ticks()
            return self.table

    async def _note_poll(self, epoch: str, number: int) -> None:
        """Count the calls of ingresses that have the current table: each makes one at least."""
        if (epoch, number) == (self.table.epoch, self.table.number):
            async with self._polled:
                counted, calls = self._polls
                self._polls = (number, calls + 1 if counted == number else 1)
                self._polled.notify_all()

    async def wait_until_routed(self, model: str) -> None:
        """Return when all ingresses have a table with the model's active version, or after ROUTED_S."""

        def is_routed() -> bool:
            route, row = self.table.models.get(model), self._models.get(model)
            return route is not None and row is not None and route.version == row.version

        await self._wait_for_ingresses(is_routed)

    async def wait_until_unrouted(self, report: ReplicaReport) -> None:
        """Return when all ingresses have a table without this draining replica, or after ROUTED_S."""

        def is_gone() -> bool:
            route = self.table.models.get(report.model)
            return route is None or all(replica.id != report.id for replica in route.replicas)

        self.kick_now()
        await self._wait_for_ingresses(is_gone)

    async def wait_until_keys_are_routed(self) -> None:
        """Return when all ingresses have a table with the current keys, or after ROUTED_S."""
        await self._wait_for_ingresses(
            lambda: (self.table.keys, self.table.admin) == (self._keys.routes, self._keys.admin_digest)
        )

    async def _wait_for_ingresses(self, is_current: Callable[[], bool]) -> None:
        """Return when all ingresses have the current table and `is_current`, or after ROUTED_S."""

        def is_routed() -> bool:
            counted, calls = self._polls
            return is_current() and calls >= len(self._registry.ingresses) and counted == self.table.number

        if self._registry.ingresses:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROUTED_S), self._polled:
                    await self._polled.wait_for(is_routed)

    def _check_ticks(self) -> None:
        """Raise ClusterError if ticks have failed for all models for FAILING_S."""
        if self.failure and time.monotonic() - self._failing_since > FAILING_S:
            raise ClusterError(self.failure)

    async def run(self) -> None:
        """Tick every TICK_S, at once after `kick_now`, and after `kick`, but then MIN_TICK_S apart. Never returns."""
        last = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + last + MIN_TICK_S - time.monotonic()):
                    await self._urgent.wait()
            last = time.monotonic()
            self._kicked.clear()
            self._urgent.clear()
            try:
                await self.tick(last)
                self.failure, self._failing_since = "", 0.0
            except Exception as error:
                log.exception("autoscaler tick failed, retrying")
                self.failure = f"control cannot manage any model: {type(error).__name__}: {error}. See control.log"
                self._failing_since = self._failing_since or last
                self.on_error("autoscaler")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._kicked.wait()

    async def tick(self, now: float) -> None:
        """Remove replicas that no longer report, decide each model's target, then publish the table.

        `now` is monotonic.
        """
        for report in self._registry.expire(now):
            log.warning("%r has not reported for %g s: removed from the routing table", report, LEASE_S)
        self._registry.keep_models(self._models.deployed)
        routes = {}
        for row in self._capacity.in_order():
            try:
                if not self._models.is_locked(row.name):
                    self._decide(row, now)
                row = self._models.deployed[row.name]  # noqa: PLW2901 # it may be proven by now
                routes[row.name] = self._view(row).route(now, self._cold_starts.usual(row.name))
                self._states[row.name].error = ""
            except Exception as error:  # noqa: BLE001 # one model's fault must not stop the others
                self._tick_failed(row, error)
                if row.name in self.table.models:
                    routes[row.name] = self.table.models[row.name]
        if self.table.number or self._is_complete(now):
            await self._publish(routes)

    def _tick_failed(self, row: Deployed, error: Exception) -> None:
        """Record, and log when it changes, that control could not handle a model."""
        text = f"control cannot manage {row.name}: {type(error).__name__}: {error}. See control.log on the head node"
        state = self._states.setdefault(row.name, ModelState())
        if state.error != text:
            log.error("%s", text, exc_info=error)
        state.error = text
        self.on_error("autoscaler")

    def _is_complete(self, now: float) -> bool:
        """Whether a first table can be published: what Serve runs has reported, or had FIRST_TABLE_S to do so."""
        self._first_tick = self._first_tick or now
        rows = self._models.deployed.values()
        missing = [
            row
            for row in rows
            if self._serve_apps.target(row.name, row.engine_version) and not self._registry.replicas_of(row.name)
        ]
        return not missing or now - self._first_tick > FIRST_TABLE_S

    async def _publish(self, models: dict[str, ModelRoute]) -> None:
        """Replace the table if it changed."""
        keys, required, admin = self._keys.routes, self._keys.required, self._keys.admin_digest
        old = self.table
        changed = models != old.models or (keys, required, admin) != (old.keys, old.keys_required, old.admin)
        if not self.table.number or changed:
            async with self._table_changed:
                self.table = replace(
                    self.table,
                    number=self.table.number + 1,
                    models=models,
                    names=by_names(models),
                    keys=keys,
                    keys_required=required,
                    admin=admin,
                )
                self._table_changed.notify_all()

    def _decide(self, row: Deployed, now: float) -> None:
        """Decide one model's target, find room for its replicas, and set the target in Serve if it changed."""
        state = self._states[row.name]
        row = self._read_reports(row, state)
        if state.failure or state.set_aside:
            self._capacity.set_nodes_aside(row, now)
        limits, demand = self._measure(row, state, now)
        target, wanted = demand.target, decide(limits, demand).target
        lowered = self._capacity.search(row, demand, wanted)
        for name, lower in lowered.items():
            self._start_setting(self._models.deployed[name], lower)
        if lowered:
            self.on_eviction(state.search.room)
        desired = wanted
        if text := self._capacity.held(row, demand, wanted):
            desired, state.search.shortage = min(wanted, demand.placed), text
        if desired > target:
            state.pending = True
            if not target and demand.waiting:
                requested = self._registry.waiting_since(row.name) or time.time()
                self._cold_starts.begin(row.name, row.engine_version, requested)
        elif wanted < target and not demand.placed:
            self._cold_starts.end(row.name, row.engine_version, "withdrawn")
        confirmed = self._serve_apps.is_confirmed(row.name, row.engine_version)
        if (desired != target or not confirmed) and not state.setting_target:
            self._start_setting(row, desired)
            if desired > target == 0 and demand.waiting and not state.search.shortage:
                self.on_wake(row)
        if state.search.freed and not state.search.announced:
            state.search.announced = True
            self.on_wake(row)

    def _read_reports(self, row: Deployed, state: ModelState) -> Deployed:
        """Take over what ready replicas report. Return the row, now proven if a replica is ready."""
        reports = self._registry.ready(row.name, row.engine_version)
        for report in reports:
            state.paths = report.paths & get_engine(row.spec.engine).paths
            state.max_model_len = report.max_model_len
        if reports and not row.proven:
            row = self._models.mark_proven(row.name)
            self.on_proven(row)
        return row

    def _measure(self, row: Deployed, state: ModelState, now: float) -> tuple[ScalingLimits, Demand]:
        """Return the policy's inputs, and update the timers and flags of `state`."""
        spec, registry = row.spec, self._registry
        target = self._serve_apps.target(row.name, row.engine_version)
        reports = registry.ready(row.name, row.engine_version)
        if state.past_failure and any(now - registry.ready_since.get(r.id, now) >= STABLE_S for r in reports):
            state.past_failure = None
        ready = len(reports)
        placed = len(self._capacity.placed(row))
        if state.warm_until <= now:
            state.warm_until = 0
        waiting = registry.waiting(row.name) + bool(state.warm_until)
        in_flight = registry.load(row.name, row.engine_version)
        self._check_surplus(row, state, ready - target, now)
        state.unloaded = state.unloaded and not waiting
        state.pending = state.pending and placed < target
        state.warmed = state.warmed and bool(target or state.warm_until)
        min_replicas = self._capacity.min_replicas(row)
        limits = ScalingLimits(min_replicas, spec.max_replicas, spec.target_ongoing_requests, spec.idle_timeout)
        if limits.required(waiting + in_flight) >= target:
            state.low_since = now
        return limits, Demand(
            now=now,
            target=target,
            ready=ready,
            waiting=waiting,
            in_flight=in_flight,
            last_used=registry.last_used.setdefault(row.name, now),
            low_since=state.low_since,
            placed=placed,
            pending=state.pending,
            unloaded=state.unloaded,
            failure=state.failure,
        )

    def _check_surplus(self, row: Deployed, state: ModelState, surplus: int, now: float) -> None:
        """Have the target set again if more replicas than that have been ready for SURPLUS_S."""
        state.surplus_since = (state.surplus_since or now) if surplus > 0 else 0
        if surplus > 0 and now - state.surplus_since > SURPLUS_S:
            log.warning("%s: %d replicas more than the target are ready: setting it again", row.name, surplus)
            self._serve_apps.mark_unconfirmed(row.name, row.engine_version)
            state.surplus_since = now

    def _start_setting(self, row: Deployed, replicas: int) -> None:
        task = asyncio.get_running_loop().create_task(self._set_target(row, replicas))
        self._states[row.name].task = task

    async def _set_target(self, row: Deployed, replicas: int) -> None:
        log.info("%s v%d: target %d", row.name, row.engine_version, replicas)
        try:
            await self._serve_apps.set_target(row, replicas, frozenset(self._states[row.name].set_aside))
        except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
            log.warning("could not set the target of %s in Serve, retrying: %r", row.name, error)

    def nodes_for(self, row: Deployed) -> list[Node]:
        """See `Capacity.nodes_for`."""
        return self._capacity.nodes_for(row)

    def freed_nodes(self, row: Deployed) -> frozenset[str]:
        """The ids of the nodes on which replicas have just ended for this model; Ray may not count that as free yet."""
        search = self._states[row.name].search
        return search.room if search.freed else frozenset()

    def shortage(self, row: Deployed, nodes: list[Node] | None = None) -> str:
        """See `Capacity.shortage`."""
        return self._capacity.shortage(row, nodes)

    def _view(self, row: Deployed) -> ModelView:
        target = self._serve_apps.target(row.name, row.engine_version)
        state = self._states.get(row.name, ModelState())
        return ModelView(row, state, self._registry, target, self._models.is_locked(row.name))

    def targets(self) -> dict[str, int]:
        """Return the target of every model, including new ones whose proof is running."""
        rows = {name: candidate.row for name, candidate in self._models.candidates.items()} | self._models.deployed
        return {name: self._serve_apps.target(name, row.engine_version) for name, row in rows.items()}

    def statuses(self) -> tuple[ModelStatus, ...]:
        """Return the status of every model: the active versions, then new models without an active version."""
        statuses = [self._view(row).status() for row in self._models.deployed.values()]
        for name, candidate in self._models.candidates.items():
            if name not in self._models.deployed:
                state: State = "failed" if candidate.cause else "waking"
                statuses.append(self._view(candidate.row).status(state, candidate.cause))
        shown = {status.name for status in statuses}
        statuses += [unreadable_status(name, cause) for name, cause in self.unreadable.items() if name not in shown]
        return tuple(statuses)
