"""Keeps what runs in step with what is asked: the scaler's inputs and effects, failures, and the routing table.

The rule itself is `scaler.decide`; deploys hold a model here while they steer it themselves.
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

from llmrun.errors import Refused
from llmrun.wire import ModelStatus, State
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.autoscaling.eviction import EvictionCandidate, choose_evictions
from llmrun_runtime.control.autoscaling.model_view import ModelState, ModelView
from llmrun_runtime.control.autoscaling.policy import Demand, Failure, ScalingLimits, decide
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.state.models import Candidate, Deployed
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.placement import Node, has_room, shortage
from llmrun_runtime.ray_nodes import cluster_nodes
from llmrun_runtime.wire.reports import ReplicaReport
from llmrun_runtime.wire.routing_table import Table, by_names

log = logging.getLogger("llmrun.control")
TICK_S = 0.25
# A replica that Serve could not place reports nothing; for so long that may be a worker's start.
PLACING_S = 4.0
# Serve acts on a target within a second; replicas that go on serving for so long beyond it have not heard.
SURPLUS_S = 10.0
# `llmrun warm` asks for a model without room for so long.
BY_HAND_S = 600.0


class Autoscaler:
    """All models in force, what they should run, and the table made of that."""

    def __init__(
        self,
        serving: ServeApps,
        registry: Registry,
        starts: ColdStarts,
        keys: Keys,
        control: tuple[str, int],
        admin: str = "",
    ) -> None:
        self.deployed: dict[str, Deployed] = {}
        self.held: set[str] = set()
        """Models that a deploy steers."""
        self.candidates: dict[str, Candidate] = {}
        """Versions that are being proven, and those of new models that could not be."""
        self.table = Table(epoch=uuid.uuid4().hex, control=control, admin=admin)
        self.on_proven: Callable[[Deployed], None] = lambda row: None
        self.on_wake: Callable[[Deployed], None] = lambda row: None
        """Called when the target of a model leaves zero because somebody waits."""
        self._serving = serving
        self._registry = registry
        self._starts = starts
        self._keys = keys
        keys.on_change = self.kick
        self._facts: dict[str, ModelState] = {}
        self._kick = asyncio.Event()
        self._changed = asyncio.Condition()

    def kick(self) -> None:
        """Look again now, not at the next tick."""
        self._kick.set()

    def put(self, row: Deployed) -> None:
        """Put a version in force; with a new engine, earlier failures are forgotten."""
        before = self.deployed.get(row.name)
        if not before or before.engine_version != row.engine_version:
            if before:
                self._starts.over(row.name, before.engine_version, "withdrawn")
            self._facts[row.name] = ModelState()
        self.deployed[row.name] = row
        self.candidates.pop(row.name, None)
        self._registry.used(row.name, time.monotonic())
        self.kick()

    def drop(self, model: str) -> None:
        """Take a model out of force."""
        self.deployed.pop(model, None)
        self._facts.pop(model, None)
        self._registry.last_used.pop(model, None)
        self._starts.forget(model)
        self.kick()

    def set_adapters(self, model: str, adapters: dict[str, str] | None, trouble: str = "") -> None:
        """What adapters a model has: their pins by name; None if nobody knows, because of `trouble`."""
        facts = self._facts.get(model)
        if facts and (facts.adapters, facts.adapters_trouble) != (adapters, trouble):
            facts.adapters, facts.adapters_trouble = adapters, trouble
            self.kick()

    def failed(self, report: ReplicaReport, cause: str) -> None:
        """A replica of what is in force did not start: its waiters hear why, and it is scaled back."""
        row = self.deployed.get(report.model)
        if not row or row.engine_version != report.version:
            return
        facts = self._facts[row.name]
        self._starts.over(row.name, row.engine_version, "failed")
        count = facts.failure.count + 1 if facts.failure else 1
        facts.failure, facts.by_hand_until = Failure(count, cause, time.monotonic()), 0
        log.warning("%s v%d did not start (%d in a row): %s", row.name, row.version, count, cause)
        self.kick()

    def started(self, report: ReplicaReport) -> None:
        """A replica has become ready: earlier failures of its version are over."""
        row = self.deployed.get(report.model)
        if row and row.engine_version == report.version:
            facts = self._facts[row.name]
            facts.failure, facts.death, facts.yielded, facts.by_hand_until = None, "", "", 0

    def died(self, report: ReplicaReport, cause: str) -> None:
        """The engine of a replica has died after it was ready; Serve starts another one."""
        row = self.deployed.get(report.model)
        log.warning("%s v%d: %s", report.model, report.version, cause)
        if row and row.engine_version == report.version:
            self._facts[row.name].death = cause

    def warm(self, model: str) -> None:
        """Wake a model as if somebody asked. Raises Refused while its start has failed too often."""
        facts = self._facts[model]
        if facts.failure and facts.failure.refuses(time.monotonic()):
            raise Refused(f"{model} did not start: {facts.failure.cause}", 503)
        facts.unloaded = False
        now = time.monotonic()
        ready = self._registry.ready(model, self.deployed[model].engine_version)
        facts.by_hand_until = 0 if ready else now + BY_HAND_S
        self._registry.used(model, now)
        self.kick()

    def unload(self, model: str) -> None:
        """Send a model to zero, until somebody asks or `warm`. Raises Refused while somebody waits for it."""
        waiting = self._registry.waiting(model)
        if waiting:
            raise Refused(f"{model}: {waiting} requests wait for it", 409)
        facts = self._facts[model]
        facts.unloaded, facts.by_hand_until = True, 0
        self.kick()

    async def watch(self, epoch: str, number: int, timeout: float) -> Table:
        """The table, as soon as it differs from the one named, or after `timeout` as it is."""
        async with self._changed:
            if (self.table.epoch, self.table.number) == (epoch, number):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        await self._changed.wait()
            return self.table

    async def run(self) -> None:
        """Tick for ever, and at once when kicked."""
        while True:
            self._kick.clear()
            try:
                await self.tick()
            except Exception:
                log.exception("a tick of the scaler failed; the next one tries again")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._kick.wait()

    async def tick(self) -> None:
        """Forget who is silent, decide every model's target, set those that changed, publish the table."""
        now = time.monotonic()
        for report in self._registry.expire(now):
            log.warning("no report from %r for a while: taken out of the table", report)
        for row in list(self.deployed.values()):
            if row.name not in self.held:
                self._decide(row, now)
        models = {row.name: self._view(row).route(now, self._starts.usual(row.name)) for row in self.deployed.values()}
        if models != self.table.models or self._keys.routes != self.table.keys:
            async with self._changed:
                number, keys = self.table.number + 1, self._keys.routes
                self.table = replace(self.table, number=number, models=models, names=by_names(models), keys=keys)
                self._changed.notify_all()

    def _decide(self, row: Deployed, now: float) -> None:
        spec, facts, registry = row.spec, self._facts[row.name], self._registry
        target = self._serving.target(row.name, row.engine_version)
        reports = registry.ready(row.name, row.engine_version)
        ready = len(reports)
        for report in reports:
            facts.paths = report.paths & get_engine(spec.engine).paths
            facts.max_model_len = report.max_model_len
        if ready and not row.proven:
            self.deployed[row.name] = row = replace(row, proven=True)
            self.on_proven(row)
        facts.by_hand_until = facts.by_hand_until if facts.by_hand_until > now else 0
        waiting, in_flight = registry.waiting(row.name) + bool(facts.by_hand_until), registry.in_flight(row.name)
        placed = len(registry.of(row.name, row.engine_version))
        facts.surplus_since = (facts.surplus_since or now) if ready > target else 0
        if ready > target and now - facts.surplus_since > SURPLUS_S:
            log.warning("%s: %d replicas serve though the target is %d: it is set again", row.name, ready, target)
            self._serving.doubt(row.name, row.engine_version)
            facts.surplus_since = now
        facts.unloaded = facts.unloaded and not waiting
        facts.pending = facts.pending and placed < target
        least = self._least(row)
        limits = ScalingLimits(least, spec.max_replicas, spec.target_ongoing_requests, spec.idle_timeout)
        if limits.needed(waiting + in_flight) >= target:
            facts.low_since = now
        demand = Demand(
            now=now,
            target=target,
            ready=ready,
            waiting=waiting,
            in_flight=in_flight,
            last_used=registry.last_used.setdefault(row.name, now),
            low_since=facts.low_since,
            placed=placed,
            pending=facts.pending,
            unloaded=facts.unloaded,
            failure=facts.failure,
        )
        wanted = decide(limits, demand).target
        asked = bool(waiting or in_flight or wanted <= least)
        self._see_to_room(row, facts, now, asked=asked, grows=wanted > target, unplaced=wanted > placed)
        if wanted > target:
            facts.pending = True
            if not target and waiting:
                self._starts.decided(row.name, row.engine_version, registry.waiting_since(row.name) or time.time())
        elif wanted < target and not placed:
            self._starts.over(row.name, row.engine_version, "withdrawn")
        sure = self._serving.is_sure(row.name, row.engine_version)
        if (wanted != target or not sure) and (facts.task is None or facts.task.done()):
            facts.task = asyncio.get_running_loop().create_task(self._set(row, wanted))
            if not target and waiting and not facts.shortage:
                self.on_wake(row)

    async def _set(self, row: Deployed, replicas: int) -> None:
        log.info("%s v%d: target %d", row.name, row.engine_version, replicas)
        try:
            await self._serving.set_target(row, replicas)
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("Serve did not take the target of %s; tried again: %r", row.name, error)

    def _least(self, row: Deployed) -> int:
        """Replicas that stay though nobody asks."""
        if self._facts[row.name].unloaded:
            return 0
        return max(row.spec.min_replicas, int(row.spec.scheduled(time.time())))

    def _see_to_room(
        self, row: Deployed, facts: ModelState, now: float, *, asked: bool, grows: bool, unplaced: bool
    ) -> None:
        """Have others make room for a replica that has none: at once for one that is wanted now, else after PLACING_S.

        Nobody makes room for one that is only tried again after failures (not `asked`).
        Ray's account of what is free is some tenths of a second old, and a worker's start takes some; hence the wait.
        """
        if not unplaced:
            facts.unplaced_since, facts.shortage, facts.going = 0, "", {}
            return
        facts.unplaced_since = facts.unplaced_since or now
        if facts.going:
            late = now - facts.going_since > PLACING_S  # one that does not even drain by then: Serve was not told
            going = {i: m for i, m in facts.going.items() if self._registry.lives(i, draining=late)}
            if going:
                facts.shortage = f"waiting for {', '.join(going.values())} to make room"
                return
            facts.going, facts.unplaced_since, facts.shortage = {}, now, ""
        if not grows and now - facts.unplaced_since <= PLACING_S:
            return
        nodes = cluster_nodes()
        facts.shortage = self.shortage(row, nodes)
        if facts.shortage and asked:
            holders = choose_evictions(row.placement, nodes, self._holders(row, now))
            for model in {holder.model for holder in holders}:
                ids = [holder.id for holder in holders if holder.model == model]
                if self._give_way(self.deployed[model], len(ids), row):
                    facts.going |= dict.fromkeys(ids, model)
            facts.going_since = now

    def _holders(self, row: Deployed, now: float) -> list[EvictionCandidate]:
        """The replicas of other models that could end."""
        found = []
        for other in self.deployed.values():
            name, registry = other.name, self._registry
            if name == row.name or not other.spec.evictable or name in self.held:
                continue
            if registry.waiting(name) or registry.in_flight(name):
                continue
            old = [
                report
                for report in registry.ready(name, other.engine_version)
                if now - registry.ready_since.get(report.id, now) >= other.spec.min_uptime
            ]
            spare = max(0, self._serving.target(name, other.engine_version) - self._least(other))
            for report in old[:spare]:
                found.append(
                    EvictionCandidate(report.id, name, report.node, other.placement, registry.last_used.get(name, 0))
                )
        return found

    def _give_way(self, row: Deployed, replicas: int, to: Deployed) -> bool:
        """End so many replicas of a model; False while its target is being set. (Serve chooses which of them.)"""
        facts = self._facts[row.name]
        if facts.task and not facts.task.done():
            return False
        log.info("%s makes room for %s", row.name, to.name)
        facts.yielded = to.name
        target = self._serving.target(row.name, row.engine_version)
        facts.task = asyncio.get_running_loop().create_task(self._set(row, max(0, target - replicas)))
        return True

    def shortage(self, row: Deployed, nodes: list[Node] | None = None) -> str:
        """Why there is no room for a replica of it now, and who holds it; "" if there is room."""
        nodes = cluster_nodes() if nodes is None else nodes
        if has_room(row.placement, nodes):
            return ""
        holders = sorted({report.model for report, _ in self._registry.replicas.values()})
        return shortage(row.placement, nodes, holders)

    def _view(self, row: Deployed) -> ModelView:
        target = self._serving.target(row.name, row.engine_version)
        return ModelView(row, self._facts.get(row.name, ModelState()), self._registry, target, row.name in self.held)

    def targets(self) -> dict[str, int]:
        """The target of every model, also of new ones that are being proven."""
        rows = {name: candidate.row for name, candidate in self.candidates.items()} | self.deployed
        return {name: self._serving.target(name, row.engine_version) for name, row in rows.items()}

    def statuses(self) -> tuple[ModelStatus, ...]:
        """All models as a person sees them: those in force, then new ones that are being proven."""
        found = [self._view(row).status() for row in self.deployed.values()]
        for name, candidate in self.candidates.items():
            if name not in self.deployed:
                state: State = "failed" if candidate.cause else "waking"
                found.append(self._view(candidate.row).status(state, candidate.cause))
        return tuple(found)
