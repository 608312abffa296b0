"""Carries out a plan: versions, proofs, handing over, removals, one deploy at a time, each step an event."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmrun.errors import LLMRunError, Refused
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun.wire import Change, DeployRequest, Plan
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.catalog.node_agents import gather_from
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.operations.plan import check, make_plan
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Candidate, Deployed
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.placement import Node, could_run, has_room, resolve
from llmrun_runtime.ray_nodes import cluster_nodes
from llmrun_runtime.wire.reports import ReplicaReport

log = logging.getLogger("llmrun.control")
PREPARE_TIMEOUT_S = 1800
POLL_S = 0.1
# Ray's account of what is free is some tenths of a second old, and a replica that has just been told to end takes a
# moment: before a version in force drains for another one, what seems to be taken is looked at for so long.
SETTLE_S = 3.0
CHANGED = "what is deployed has changed since the diff was made: run the command again"


@dataclass
class Proof:
    """A candidate's first replica: whether one was placed, whether it answers, or why not."""

    placed: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    cause: str = ""


class Deployer:
    """Plans and deploys over control's parts."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        registry: Registry,
        scaling: Autoscaler,
        serving: ServeApps,
        stock: WeightsCatalog,
        adapters: AdaptersCatalog,
        jobs: Operations,
    ) -> None:
        self._settings = settings
        self._database = database
        self._registry = registry
        self._scaling = scaling
        self._serving = serving
        self._lock = asyncio.Lock()
        self._proofs: dict[tuple[str, int], Proof] = {}
        self._stock = stock
        self._adapters = adapters
        self._jobs = jobs
        self.sources: dict[str, str] = {}

    async def plan(self, request: DeployRequest, *, ask: bool = True) -> tuple[Plan, dict[str, Deployed]]:
        """What a deploy of `request` would do now, and each model as it would be. Raises LLMRunError.

        `ask`: sources are asked what their names mean now; else what they meant at the last plan goes on.
        """
        nodes = cluster_nodes()
        for spec in request.specs:
            self._check(spec, nodes)
        placements = {spec.name: resolve(spec, nodes) for spec in request.specs}
        deployed = self._scaling.deployed
        check(request, deployed, self.sources)
        found = await asyncio.gather(
            *(self._stock.pin(spec, placements[spec.name], deployed.get(spec.name), ask=ask) for spec in request.specs)
        )
        settled = await asyncio.gather(
            *(self._adapters.settle(spec, placements[spec.name], ask=ask) for spec in request.specs)
        )
        rows = {
            spec.name: Deployed(request.app, 0, 0, spec, placements[spec.name], proven=False, pin=pin)
            for spec, pin in zip(settled, found, strict=True)
        }
        return make_plan(request, deployed, rows), rows

    def _check(self, spec: ModelSpec, nodes: list[Node]) -> None:
        """Refuse what can be known to fail before anything starts."""
        if why := get_engine(spec.engine).refuses(spec):
            raise Refused(f"{spec.name}: {why}", 422)
        real = [node for node in nodes if node.id]
        path = Path(spec.path).expanduser() if spec.path else None
        if path and len(nodes) == len(real) == 1 and not path.exists():
            raise Refused(f"{spec.name}: model={spec.model.source!r}: there is no such path on the cluster's node", 409)
        if spec.code and not self._database.has_package(spec.code.package):
            raise Refused(f"{spec.name}: its code package {spec.code.package[:12]} was not uploaded", 409)

    async def start(self, request: DeployRequest) -> Operation:
        """Begin to carry `request` out; listen to the job for how it goes. Raises LLMRunError."""
        plan, _ = await self.plan(request, ask=not request.plan)
        if request.plan and request.plan != plan.fingerprint:
            raise Refused(CHANGED, 409)
        return self._jobs.start(f"deploy of {request.app}", lambda job: self._run(request, plan.fingerprint, job))

    def heard(self, report: ReplicaReport, cause: str = "") -> bool:
        """Pass on a replica's report if it is of a proof; whether it was."""
        proof = self._proofs.get((report.model, report.version))
        if not proof:
            return False
        proof.placed.set()
        if cause or report.state == "ready":
            proof.cause = cause
            proof.done.set()
        return True

    async def _run(self, request: DeployRequest, shown: str, job: Operation) -> None:
        if self._lock.locked():
            await job.say("step", text="another deploy is running; this one follows")
        async with self._lock:
            plan, rows = await self.plan(request, ask=False)
            if plan.fingerprint != shown:
                raise Refused(CHANGED, 409)
            for change in plan.changes:  # removals first: a renamed model needs the room and the names
                if change.kind == "remove" and request.prune:
                    await self._remove([change.model])
                    await job.say("removed", change.model)
            for change in plan.changes:
                if change.kind in ("add", "change", "tune"):
                    await self._carry_out(change, self._new_version(change, rows[change.model]), request, job)

    def _new_version(self, change: Change, row: Deployed) -> Deployed:
        number = self._database.next_version(row.name)
        old = self._scaling.deployed.get(row.name)
        if change.kind == "tune" and old:
            return replace(old, version=number, spec=row.spec)
        return replace(row, version=number, engine_version=number)

    async def _carry_out(self, change: Change, row: Deployed, request: DeployRequest, job: Operation) -> None:
        if change.kind == "tune":
            self._put_in_force(row, request.source)
            await job.say("tuned", row.name, f"version {row.version}, without a restart")
            return
        try:
            with self._stock.wanted(row.pin):
                await self._prepare(row, job, lazy=request.lazy)
                await self._start_version(row, request, job)
        except LLMRunError as error:
            await job.say("failed", row.name, str(error))

    async def _start_version(self, row: Deployed, request: DeployRequest, job: Operation) -> None:
        """Prove it (unless `lazy`) and put it in force."""
        if request.lazy:
            await self._replace(row, request.source)
            await job.say("unproven", row.name, f"version {row.version} deployed, not started (--lazy)")
            return
        old = self._scaling.deployed.get(row.name)
        settled = False
        try:
            why = await self._make_room(row, old, job)
            cause = "" if why else await self._prove(row, job)
            if why:
                await self._replace(row, request.source)
                await job.say("unproven", row.name, f"version {row.version} deployed, not proven: {why}")
            elif cause:
                self._database.put_version(row, in_force=False)
                self._scaling.candidates[row.name] = Candidate(row, cause)
                kept = f"; version {old.version} stays in force" if old else ""
                await job.say("failed", row.name, f"{cause}{kept} (`llmrun logs {row.name}` has all of it)")
            else:
                await self._replace(replace(row, proven=True), request.source)
                await job.say("ready", row.name, f"version {row.version}")
            settled = not cause
        finally:
            if not settled:
                await self._serving.delete(row.name, row.engine_version)
            self._scaling.held.discard(row.name)
            self._scaling.kick()

    async def _prepare(self, row: Deployed, job: Operation, *, lazy: bool) -> None:
        """Bring code, requirements and (not if `lazy`) weights to every node that could run it. Raises LLMRunError."""
        nodes = [node for node in cluster_nodes() if node.id and could_run(row.placement, node)]
        if row.spec.code or row.spec.requirements:
            await job.say("step", row.name, "preparing nodes")
            await gather_from(nodes, lambda node: agent_on(node.id).prepare.remote(row.spec), PREPARE_TIMEOUT_S)
        if row.pin and not lazy:
            await self._stock.spread(row.pin, row.spec.env, nodes, job, row.name)

    async def _make_room(self, row: Deployed, old: Deployed | None, job: Operation) -> str:
        """See to room for the proof, by draining the version before if need be; why there is none, or ""."""
        if any(not node.id and could_run(row.placement, node) for node in cluster_nodes()):
            return ""
        if await self._until(lambda: has_room(row.placement, cluster_nodes()), SETTLE_S):
            return ""
        nodes = cluster_nodes()
        holders = self._registry.of(row.name)
        if not old or not holders or not has_room(row.placement, nodes, {r.node: old.placement for r in holders}):
            return self._scaling.shortage(row, nodes)
        await job.say("step", row.name, f"no room beside version {old.version}: it drains first, requests wait")
        self._scaling.held.add(row.name)
        await self._serving.set_target(old, 0)
        gone = await self._until(lambda: not self._registry.of(row.name), self._settings.drain_timeout)
        roomy = gone and await self._until(
            lambda: has_room(row.placement, cluster_nodes()), self._settings.place_timeout
        )
        if roomy:
            return ""
        self._scaling.held.discard(row.name)
        return self._scaling.shortage(row) or "the version before did not drain in time"

    async def _prove(self, row: Deployed, job: Operation) -> str:
        """Start one replica: "" when it answers, the cause if it does not."""
        proof = self._proofs[row.name, row.engine_version] = Proof()
        self._scaling.candidates[row.name] = Candidate(row)
        try:
            await job.say("step", row.name, f"version {row.version}: placing a replica on {row.placement}")
            await self._serving.set_target(row, 1)
            if not await self._until(proof.placed.is_set, self._settings.place_timeout):
                trouble = await self._serving.trouble(row.name, row.engine_version) or self._scaling.shortage(row)
                limit = f"no replica was placed within {self._settings.place_timeout:g} s (LLMRUN_PLACE_TIMEOUT)"
                return f"{limit}: {trouble or 'Ray does not say why'}"
            place = next((report.host for report in self._registry.of(row.name, row.engine_version)), "")
            await job.say("step", row.name, f"starting the engine on node {place}")
            # The replica keeps start_timeout itself; the rest is for preparing its node and for its report.
            limit_s = self._settings.start_timeout + PREPARE_TIMEOUT_S
            if not await self._until(proof.done.is_set, limit_s):
                return f"nothing was heard of the replica for {limit_s:g} s"
            return proof.cause
        finally:
            del self._proofs[row.name, row.engine_version]

    async def _replace(self, row: Deployed, source: str) -> None:
        """Put `row` in force and drain what was."""
        old = self._scaling.deployed.get(row.name)
        self._put_in_force(row, source)
        if old and old.engine_version != row.engine_version:
            await self._serving.delete(old.name, old.engine_version)

    def _put_in_force(self, row: Deployed, source: str) -> None:
        self.sources[row.app] = source
        self._database.put_app(row.app, source)
        self._database.put_version(row, in_force=True)
        self._scaling.put(row)
        self._adapters.tell(row.name)

    async def _remove(self, models: list[str]) -> None:
        """Take models out of force, forget them, and drain what runs of them."""
        rows = [self._scaling.deployed[name] for name in models if name in self._scaling.deployed]
        self._database.remove(models)
        for name in models:
            self._scaling.candidates.pop(name, None)
        for row in rows:
            self._scaling.drop(row.name)
            await self._serving.delete(row.name, row.engine_version)
        apps = {row.app for row in self._scaling.deployed.values()}
        self.sources = {app: source for app, source in self.sources.items() if app in apps}

    async def delete(self, models: list[str]) -> None:
        """Remove models as a deploy with `prune` does. Raises Refused while a deploy runs."""
        if self._lock.locked():
            raise Refused("a deploy is running: try again when it has ended (`llmrun status` shows it)", 409)
        async with self._lock:
            await self._remove(models)

    async def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True
