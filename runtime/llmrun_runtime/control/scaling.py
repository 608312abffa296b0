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
from dataclasses import dataclass, field, replace

import ray

from llmrun.errors import Refused
from llmrun.wire import ModelStatus, ReplicaStatus, State
from llmrun_runtime.control.database import Deployed
from llmrun_runtime.control.placing import Node, has_room, shortage
from llmrun_runtime.control.registry import Registry
from llmrun_runtime.control.room import Holder, make_room
from llmrun_runtime.control.serving import Serving, cluster_nodes
from llmrun_runtime.control.starts import Starts
from llmrun_runtime.engines.kinds import get_engine
from llmrun_runtime.reports import Registration
from llmrun_runtime.scaler import Demand, Failure, Limits, decide
from llmrun_runtime.table import ModelRoute, ReplicaRoute, Table, by_names

log = logging.getLogger("llmrun.control")
TICK_S = 0.25
# A replica that Serve could not place reports nothing; for so long that may be a worker's start.
PLACING_S = 4.0
# What comes after each moment that a replica reports, the last one first.
PHASES = {"forked": "loading weights", "weights": "starting the engine", "placed": "bringing weights"}


@dataclass
class Facts:
    """What is remembered of one model in force beside its row."""

    failure: Failure | None = None
    death: str = ""
    low_since: float = 0
    unplaced_since: float = 0
    shortage: str = ""
    pending: bool = False
    """The target was raised, and not all of that has been placed yet."""
    by_hand: bool = False
    """`llmrun warm` waits for it."""
    unloaded: bool = False
    """`llmrun unload`: zero until somebody asks."""
    going: dict[str, str] = field(default_factory=dict)
    """Replicas that make room for this one, and their models."""
    going_since: float = 0
    yielded: str = ""
    """The model that this one made room for."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Candidate:
    """A version that is not in force: it is being proven, or `cause` says why it could not be."""

    row: Deployed
    cause: str = ""


class Scaling:
    """All models in force, what they should run, and the table made of that."""

    def __init__(self, serving: Serving, registry: Registry, starts: Starts, control: tuple[str, int]) -> None:
        self.deployed: dict[str, Deployed] = {}
        self.held: set[str] = set()
        """Models that a deploy steers."""
        self.candidates: dict[str, Candidate] = {}
        """Versions that are being proven, and those of new models that could not be."""
        self.table = Table(epoch=uuid.uuid4().hex, control=control)
        self.on_proven: Callable[[Deployed], None] = lambda row: None
        self._serving = serving
        self._registry = registry
        self._starts = starts
        self._facts: dict[str, Facts] = {}
        self._kick = asyncio.Event()
        self._changed = asyncio.Condition()

    def kick(self) -> None:
        """Look again now, not at the next tick."""
        self._kick.set()

    def put(self, row: Deployed) -> None:
        """Put a version in force; with a new engine, earlier failures are forgotten."""
        before = self.deployed.get(row.name)
        if not before or before.engine_version != row.engine_version:
            self._facts[row.name] = Facts()
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

    def failed(self, report: Registration, cause: str) -> None:
        """A replica of what is in force did not start: its waiters hear why, and it is scaled back."""
        row = self.deployed.get(report.model)
        if not row or row.engine_version != report.version:
            return
        facts = self._facts[row.name]
        self._starts.over(row.name, row.engine_version)
        count = facts.failure.count + 1 if facts.failure else 1
        facts.failure, facts.by_hand = Failure(count, cause, time.monotonic()), False
        log.warning("%s v%d did not start (%d in a row): %s", row.name, row.version, count, cause)
        self.kick()

    def started(self, report: Registration) -> None:
        """A replica has become ready: earlier failures of its version are over."""
        row = self.deployed.get(report.model)
        if row and row.engine_version == report.version:
            facts = self._facts[row.name]
            facts.failure, facts.death, facts.yielded, facts.by_hand = None, "", "", False

    def died(self, report: Registration, cause: str) -> None:
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
        facts.by_hand = not self._registry.ready(model, self.deployed[model].engine_version)
        self._registry.used(model, time.monotonic())
        self.kick()

    def unload(self, model: str) -> None:
        """Send a model to zero, until somebody asks or `warm`. Raises Refused while somebody waits for it."""
        waiting = self._registry.waiting(model)
        if waiting:
            raise Refused(f"{model}: {waiting} requests wait for it", 409)
        facts = self._facts[model]
        facts.unloaded, facts.by_hand = True, False
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
        models = {row.name: self._route(row, now) for row in self.deployed.values()}
        if models != self.table.models:
            async with self._changed:
                self.table = replace(self.table, number=self.table.number + 1, models=models, names=by_names(models))
                self._changed.notify_all()

    def _decide(self, row: Deployed, now: float) -> None:
        spec, facts, registry = row.spec, self._facts[row.name], self._registry
        target = self._serving.target(row.name, row.engine_version)
        ready = len(registry.ready(row.name, row.engine_version))
        if ready and not row.proven:
            self.deployed[row.name] = row = replace(row, proven=True)
            self.on_proven(row)
        waiting, in_flight = registry.waiting(row.name) + facts.by_hand, registry.in_flight(row.name)
        placed = len(registry.of(row.name, row.engine_version))
        facts.unloaded = facts.unloaded and not waiting
        facts.pending = facts.pending and placed < target
        least = self._least(row)
        limits = Limits(least, spec.max_replicas, spec.target_ongoing_requests, spec.idle_timeout)
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
            self._starts.over(row.name, row.engine_version)
        sure = self._serving.is_sure(row.name, row.engine_version)
        if (wanted != target or not sure) and (facts.task is None or facts.task.done()):
            facts.task = asyncio.get_running_loop().create_task(self._set(row, wanted))

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
        self, row: Deployed, facts: Facts, now: float, *, asked: bool, grows: bool, unplaced: bool
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
            holders = make_room(row.placement, nodes, self._holders(row, now))
            for model in {holder.model for holder in holders}:
                ids = [holder.id for holder in holders if holder.model == model]
                if self._give_way(self.deployed[model], len(ids), row):
                    facts.going |= dict.fromkeys(ids, model)
            facts.going_since = now

    def _holders(self, row: Deployed, now: float) -> list[Holder]:
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
                found.append(Holder(report.id, name, report.node, other.placement, registry.last_used.get(name, 0)))
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

    def _route(self, row: Deployed, now: float) -> ModelRoute:
        facts = self._facts[row.name]
        failure = facts.failure
        ready = self._registry.ready(row.name, row.engine_version)
        return ModelRoute(
            name=row.name,
            app=row.app,
            version=row.version,
            state=self._state(row),
            created=int(row.created),
            names=row.spec.served_names,
            paths=get_engine(row.spec.engine).paths,
            max_ongoing=row.spec.max_ongoing_requests,
            replicas=tuple(ReplicaRoute(r.id, r.host, r.port, r.token) for r in ready),
            failures=failure.count if failure else 0,
            paused=failure is not None and failure.refuses(now),
            cause=self._cause(row),
            phase=self._phase(row),
            usual_start=self._starts.usual(row.name),
            max_queued=row.spec.max_queued,
        )

    def _phase(self, row: Deployed) -> str:
        """What a model that wakes is at."""
        if self._registry.ready(row.name, row.engine_version):
            return ""
        passed = {part for report in self._registry.of(row.name, row.engine_version) for part in report.moments}
        for part, phase in PHASES.items():
            if part in passed:
                return phase
        return self._facts[row.name].shortage or "placing a replica"

    def _state(self, row: Deployed) -> State:
        reports = self._registry.of(row.name)
        if self._registry.ready(row.name, row.engine_version):
            return "hot"
        by_hand = self._facts[row.name].by_hand
        if by_hand or self._serving.target(row.name, row.engine_version) or row.name in self.held:
            return "waking"
        if reports:
            return "draining"
        return "failed" if self._facts[row.name].failure else "cold"

    def statuses(self) -> tuple[ModelStatus, ...]:
        """All models as a person sees them: those in force, then new ones that are being proven."""
        rows = [self._status(row, self._state(row), self._cause(row)) for row in self.deployed.values()]
        for name, candidate in self.candidates.items():
            if name not in self.deployed:
                rows.append(self._status(candidate.row, "failed" if candidate.cause else "waking", candidate.cause))
        return tuple(rows)

    def _cause(self, row: Deployed) -> str:
        facts = self._facts[row.name]
        gave = f"made room for {facts.yielded}" if facts.yielded else ""
        return facts.failure.cause if facts.failure else facts.death or facts.shortage or gave

    def _status(self, row: Deployed, state: State, cause: str) -> ModelStatus:
        reports = self._registry.of(row.name)
        return ModelStatus(
            name=row.name,
            app=row.app,
            state=state,
            version=row.version,
            proven=row.proven,
            replicas=len(self._registry.ready(row.name, row.engine_version)),
            in_flight=self._registry.in_flight(row.name),
            waiting=self._registry.waiting(row.name),
            model=row.spec.model.source,
            pin=row.pin.short if row.pin else "",
            aliases=row.spec.aliases,
            placement=str(row.placement),
            cause=cause,
            details=tuple(
                ReplicaStatus(
                    id=r.id[:12],
                    version=r.version,
                    state=r.state,
                    node=r.node[:12],
                    address=f"{r.host}:{r.port}" if r.port else "",
                    in_flight=r.in_flight,
                )
                for r in reports
            ),
        )
