"""The autoscaling loop: applies the policy to each model, evicts idle replicas, publishes the routing table.

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

from llmrun.errors import Refused
from llmrun.wire import ModelStatus, State
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.autoscaling.eviction import EvictionCandidate, choose_evictions
from llmrun_runtime.control.autoscaling.model_state import EvictionState, ModelState
from llmrun_runtime.control.autoscaling.model_view import ModelView, unreadable_status
from llmrun_runtime.control.autoscaling.policy import Demand, Failure, ScalingLimits, decide
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.placement import Node, has_capacity, shortage
from llmrun_runtime.ray_nodes import cluster_nodes
from llmrun_runtime.wire.reports import LEASE_S, ReplicaReport
from llmrun_runtime.wire.routing_table import ModelRoute, Table, by_names

log = logging.getLogger("llmrun.control")
TICK_S = 0.25
# A replica reports once its worker has started. One that has not reported after this time counts as not placed.
PLACING_S = 4.0
# Serve acts on a target within a second. If surplus replicas stay for this long, Serve did not receive the target.
SURPLUS_S = 10.0
# `llmrun warm` requests a replica for this long if there is not enough capacity.
WARM_S = 600.0
# Replicas report twice per second. After a restart, control waits this long for those that Serve runs.
FIRST_TABLE_S = 2.0


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
        control: tuple[str, int],
        admin: str = "",
    ) -> None:
        self.table = Table(epoch=uuid.uuid4().hex, control=control, admin=admin)
        self.on_proven: Callable[[Deployed], None] = lambda row: None
        """Called when an unproven version's first replica is ready."""
        self.on_wake: Callable[[Deployed], None] = lambda row: None
        """Called when a request raises a model's target from zero."""
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
        self._first_tick = 0.0
        self._kicked = asyncio.Event()
        self._table_changed = asyncio.Condition()

    def kick(self) -> None:
        """Run the next tick now."""
        self._kicked.set()

    def activate(self, row: Deployed) -> None:
        """Make a version the active one. A new engine version starts with a clean state, without earlier failures."""
        previous = self._models.put(row)
        if not previous or previous.engine_version != row.engine_version:
            if previous:
                self._cold_starts.end(row.name, previous.engine_version, "withdrawn")
            self._states[row.name] = ModelState(low_since=time.monotonic())
        self._registry.mark_used(row.name, time.monotonic())
        self.kick()

    def remove(self, model: str) -> None:
        """Remove a model's active version."""
        self._models.remove(model)
        self._states.pop(model, None)
        self._registry.last_used.pop(model, None)
        self._cold_starts.forget(model)
        self.kick()

    def set_adapters(self, model: str, adapters: dict[str, str] | None, error: str = "") -> None:
        """Set a model's adapters: their pins by name; None if they could not be listed, because of `error`."""
        state = self._states.get(model)
        if state and (state.adapters, state.adapters_error) != (adapters, error):
            state.adapters, state.adapters_error = adapters, error
            self.kick()

    def replica_failed(self, report: ReplicaReport, cause: str, first_seen: float) -> None:
        """Count a failed start of the active version: waiting requests fail with `cause`, the model backs off.

        Replicas that started together fail together, and count as one failure. `first_seen` is the time of the
        replica's first report (monotonic).
        """
        row = self._models.get(report.model)
        if not row or row.engine_version != report.version:
            return
        state = self._states[row.name]
        self._cold_starts.end(row.name, row.engine_version, "failed")
        last, now = state.failure, time.monotonic()
        if last and first_seen < last.at:
            log.warning("%s v%d: another replica of the same start failed: %s", row.name, row.version, cause)
            return
        count = last.count + 1 if last else 1
        state.failure, state.warm_until = Failure(count, cause, now), 0
        log.warning("%s v%d failed to start (%d in a row): %s", row.name, row.version, count, cause)
        self.kick()

    def replica_ready(self, report: ReplicaReport) -> None:
        """Clear the failures of the replica's version."""
        row = self._models.get(report.model)
        if row and row.engine_version == report.version:
            state = self._states[row.name]
            state.failure, state.death, state.evicted_for, state.warm_until = None, "", "", 0

    def engine_died(self, report: ReplicaReport, cause: str) -> None:
        """Record that a replica's engine died after it was ready. Serve starts another replica."""
        row = self._models.get(report.model)
        log.warning("%s v%d: %s", report.model, report.version, cause)
        if row and row.engine_version == report.version:
            self._states[row.name].death = cause

    def warm(self, name: str) -> str:
        """Wake the model with that name or alias, as a request would. Return the model's name.

        Raises Refused if the model is not found or locked, or refuses requests after failed starts.
        """
        row = self._models.resolve_unlocked(name)
        state, now = self._states[row.name], time.monotonic()
        if state.failure and state.failure.refuses(now):
            raise Refused(f"{row.name} failed to start: {state.failure.cause}", 503)
        state.unloaded = False
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
        """
        async with self._table_changed:
            if not self.table.number:
                async with asyncio.timeout(timeout):
                    await self._table_changed.wait_for(lambda: self.table.number)
            if (self.table.epoch, self.table.number) == (epoch, number):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        await self._table_changed.wait()
            return self.table

    async def run(self) -> None:
        """Tick every TICK_S, and at once after `kick`. Never returns."""
        while True:
            self._kicked.clear()
            try:
                await self.tick()
            except Exception:
                log.exception("autoscaler tick failed, retrying")
                self.on_error("autoscaler")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._kicked.wait()

    async def tick(self) -> None:
        """Remove replicas that no longer report, decide each model's target, then publish the table."""
        now = time.monotonic()
        for report in self._registry.expire(now):
            log.warning("%r has not reported for %g s: removed from the routing table", report, LEASE_S)
        self._registry.keep_models(self._models.deployed)
        routes = {}
        for row in list(self._models.deployed.values()):
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
        if not self.table.number or models != self.table.models or self._keys.routes != self.table.keys:
            async with self._table_changed:
                number, keys = self.table.number + 1, self._keys.routes
                self.table = replace(self.table, number=number, models=models, names=by_names(models), keys=keys)
                self._table_changed.notify_all()

    def _decide(self, row: Deployed, now: float) -> None:
        """Decide one model's target, and set it in Serve if it changed."""
        state = self._states[row.name]
        row = self._read_reports(row, state)
        limits, demand = self._measure(row, state, now)
        target, desired = demand.target, decide(limits, demand).target
        self._find_capacity(row, state, limits, demand, desired)
        if desired > target:
            state.pending = True
            if not target and demand.waiting:
                requested = self._registry.waiting_since(row.name) or time.time()
                self._cold_starts.begin(row.name, row.engine_version, requested)
        elif desired < target and not demand.placed:
            self._cold_starts.end(row.name, row.engine_version, "withdrawn")
        confirmed = self._serve_apps.is_confirmed(row.name, row.engine_version)
        if (desired != target or not confirmed) and not state.setting_target:
            state.task = asyncio.get_running_loop().create_task(self._set_target(row, desired))
            if not target and demand.waiting and not state.eviction.shortage:
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
        ready = len(registry.ready(row.name, row.engine_version))
        placed = len(registry.placed(row.name, row.engine_version))
        if state.warm_until <= now:
            state.warm_until = 0
        waiting, in_flight = registry.waiting(row.name) + bool(state.warm_until), registry.in_flight(row.name)
        self._check_surplus(row, state, ready - target, now)
        state.unloaded = state.unloaded and not waiting
        state.pending = state.pending and placed < target
        min_replicas = self._min_replicas(row)
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

    async def _set_target(self, row: Deployed, replicas: int) -> None:
        log.info("%s v%d: target %d", row.name, row.engine_version, replicas)
        try:
            await self._serve_apps.set_target(row, replicas)
        except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
            log.warning("could not set the target of %s in Serve, retrying: %r", row.name, error)

    def _min_replicas(self, row: Deployed) -> int:
        """Return the replicas to keep without requests."""
        if self._states[row.name].unloaded:
            return 0
        return max(row.spec.min_replicas, int(row.spec.scheduled(time.time())))

    def _find_capacity(
        self, row: Deployed, state: ModelState, limits: ScalingLimits, demand: Demand, desired: int
    ) -> None:
        """Evict idle replicas of other models if a required replica does not fit.

        When the target rises, this happens at once; otherwise after PLACING_S, because Ray's numbers of free resources
        are some tenths of a second old and a worker takes time to start. A replica that is only a retry after failures
        evicts none.
        """
        now, eviction = demand.now, state.eviction
        if desired <= demand.placed:
            state.eviction = EvictionState()
            return
        eviction.unplaced_since = eviction.unplaced_since or now
        if eviction.victims:
            # A victim that does not even drain by then: Serve did not receive the target.
            late = now - eviction.started > PLACING_S
            running = {i: m for i, m in eviction.victims.items() if self._registry.is_registered(i, draining=late)}
            if running:
                eviction.shortage = f"waiting for the eviction of {', '.join(dict.fromkeys(running.values()))}"
                return
            state.eviction = eviction = EvictionState(unplaced_since=now)
        # The model's own draining replica may free its resources in a moment.
        draining = len(self._registry.replicas_of(row.name)) > demand.placed
        if (desired <= demand.target or draining) and now - eviction.unplaced_since <= PLACING_S:
            return
        nodes = cluster_nodes()
        eviction.shortage = self.shortage(row, nodes)
        requested = demand.waiting or demand.in_flight or desired <= limits.min_replicas
        if eviction.shortage and requested:
            victims = choose_evictions(row.placement, nodes, self._eviction_candidates(row, now))
            for model in {victim.model for victim in victims}:
                ids = [victim.id for victim in victims if victim.model == model]
                if self._evict(self._models.deployed[model], len(ids), row):
                    eviction.victims |= dict.fromkeys(ids, model)
            eviction.started = now

    def _eviction_candidates(self, row: Deployed, now: float) -> list[EvictionCandidate]:
        """Return the replicas of other models that may be evicted."""
        registry, candidates = self._registry, []
        for other in self._models.deployed.values():
            name = other.name
            if name == row.name or not other.spec.evictable or self._models.is_locked(name):
                continue
            if registry.waiting(name) or registry.in_flight(name):
                continue
            old = [
                report
                for report in registry.ready(name, other.engine_version)
                if now - registry.ready_since.get(report.id, now) >= other.spec.min_uptime
            ]
            spare = max(0, self._serve_apps.target(name, other.engine_version) - self._min_replicas(other))
            idle_since = registry.last_used.get(name, 0)
            candidates += [EvictionCandidate(r.id, name, r.node, other.placement, idle_since) for r in old[:spare]]
        return candidates

    def _evict(self, row: Deployed, replicas: int, for_row: Deployed) -> bool:
        """Lower a model's target by `replicas`; Serve chooses which. False while its target is being set."""
        state = self._states[row.name]
        if state.setting_target:
            return False
        log.info("evicting %d replicas of %s for %s", replicas, row.name, for_row.name)
        state.evicted_for = for_row.name
        target = self._serve_apps.target(row.name, row.engine_version)
        state.task = asyncio.get_running_loop().create_task(self._set_target(row, max(0, target - replicas)))
        return True

    def shortage(self, row: Deployed, nodes: list[Node] | None = None) -> str:
        """Say why a replica of the version cannot be placed now, and which models use resources; "" if it can."""
        nodes = cluster_nodes() if nodes is None else nodes
        if has_capacity(row.placement, nodes):
            return ""
        users = sorted({report.model for report, _ in self._registry.replicas.values()})
        return shortage(row.placement, nodes, users)

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
