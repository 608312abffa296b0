"""Plans and runs deploys, one at a time: new versions, proofs, activation, removals. Each step emits an event."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from llmrun.errors import LLMRunError, Refused
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun.wire import DeployRequest, Plan
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.catalog.node_agents import call_all
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.operations.plan import check, make_plan
from llmrun_runtime.control.operations.proof import PREPARE_TIMEOUT_S, Prover
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Candidate, Deployed, Models
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.placement import Node, could_run, resolve
from llmrun_runtime.ray_nodes import cluster_nodes
from llmrun_runtime.wire.reports import ReplicaReport

PLAN_CHANGED = "the deployed models have changed since the diff was shown. Run the command again"


class Deployer:
    """Plan, deploy and delete models."""

    def __init__(
        self,
        *,
        settings: Settings,
        database: Database,
        registry: Registry,
        models: Models,
        autoscaler: Autoscaler,
        serve_apps: ServeApps,
        weights: WeightsCatalog,
        adapters: AdaptersCatalog,
        operations: Operations,
    ) -> None:
        self._database = database
        self._models = models
        self._autoscaler = autoscaler
        self._serve_apps = serve_apps
        self._weights = weights
        self._adapters = adapters
        self._operations = operations
        self._prover = Prover(
            settings=settings, registry=registry, models=models, autoscaler=autoscaler, serve_apps=serve_apps
        )
        self._lock = asyncio.Lock()
        self.sources: dict[str, str] = {}
        """Where each app was deployed from, as in `DeployRequest.source`."""

    async def plan(self, request: DeployRequest, *, fresh: bool = True) -> tuple[Plan, dict[str, Deployed]]:
        """Return what a deploy of `request` would do now, and each model as it would become. Raises LLMRunError.

        `fresh`: resolve weights and adapters at their sources now, instead of using the results of the last plan.
        """
        nodes = cluster_nodes()
        for spec in request.specs:
            await self._check(spec, nodes)
        placements = {spec.name: resolve(spec, nodes) for spec in request.specs}
        deployed = self._models.deployed
        check(request, deployed, self.sources)
        pins = await asyncio.gather(
            *(
                self._weights.pin(spec, placements[spec.name], deployed.get(spec.name), fresh=fresh)
                for spec in request.specs
            )
        )
        specs = await asyncio.gather(
            *(self._adapters.with_max_rank(spec, placements[spec.name], fresh=fresh) for spec in request.specs)
        )
        rows = {
            spec.name: Deployed(request.app, 0, 0, spec, placements[spec.name], proven=False, pin=pin)
            for spec, pin in zip(specs, pins, strict=True)
        }
        return make_plan(request, deployed, rows), rows

    async def _check(self, spec: ModelSpec, nodes: list[Node]) -> None:
        """Raise Refused for errors that are certain before anything starts."""
        if why := get_engine(spec.engine).refuses(spec):
            raise Refused(f"{spec.name}: {why}", 422)
        real = [node for node in nodes if node.id]
        path = Path(spec.path).expanduser() if spec.path else None
        if path and len(nodes) == len(real) == 1 and not path.exists():
            raise Refused(f"{spec.name}: model={spec.model.source!r}: path not found on the cluster's node", 409)
        if spec.code and not await self._database.run(self._database.has_package, spec.code.package):
            text = f"{spec.name}: code package {spec.code.package[:12]} not found: it was not uploaded. Deploy again"
            raise Refused(text, 409)

    async def start(self, request: DeployRequest) -> Operation:
        """Start a deploy. Its progress and result are the operation's events. Raises LLMRunError."""
        plan, _ = await self.plan(request, fresh=not request.plan)
        if request.plan and request.plan != plan.fingerprint:
            raise Refused(PLAN_CHANGED, 409)
        return self._operations.start(
            f"deploy of {request.app}", lambda operation: self._deploy(request, plan.fingerprint, operation)
        )

    def on_report(self, report: ReplicaReport, cause: str = "") -> bool:
        """Process a replica's report, with the cause if it failed. Return whether the replica belongs to a proof."""
        return self._prover.on_report(report, cause)

    async def _deploy(self, request: DeployRequest, fingerprint: str, operation: Operation) -> None:
        if self._lock.locked():
            await operation.emit("step", text="waiting for another deploy to finish")
        async with self._lock:
            plan, rows = await self.plan(request, fresh=False)
            if plan.fingerprint != fingerprint:
                raise Refused(PLAN_CHANGED, 409)
            for change in plan.changes:  # removals first: a renamed model needs the resources and the names
                if change.kind == "remove" and request.prune:
                    await self._remove([change.model])
                    await operation.emit("removed", change.model)
            for change in plan.changes:
                if change.kind == "tune":
                    await self._tune(rows[change.model], request, operation)
                elif change.kind in ("add", "change"):
                    await self._start_version(rows[change.model], request, operation)

    async def _tune(self, row: Deployed, request: DeployRequest, operation: Operation) -> None:
        """Activate new options. The running engine stays."""
        active = self._models.deployed[row.name]
        number = await self._database.run(self._database.reserve_version, row.name)
        row = replace(active, version=number, spec=row.spec)
        await self._activate(row, request.source)
        await operation.emit("tuned", row.name, f"version {row.version}, without a restart")

    async def _start_version(self, row: Deployed, request: DeployRequest, operation: Operation) -> None:
        """Prepare nodes, prove the new version and activate it. An error fails this model only."""
        number = await self._database.run(self._database.reserve_version, row.name)
        row = replace(row, version=number, engine_version=number)
        try:
            with self._weights.protect(row.pin):
                await self._prepare(row, operation, lazy=request.lazy)
                if request.lazy:
                    await self._replace_active(row, request.source)
                    text = f"version {row.version} deployed, not started (--lazy)"
                    await operation.emit("unproven", row.name, text)
                else:
                    await self._prove_and_activate(row, request, operation)
        except LLMRunError as error:
            await operation.emit("failed", row.name, str(error))

    async def _prepare(self, row: Deployed, operation: Operation, *, lazy: bool) -> None:
        """Install code, requirements and (unless `lazy`) weights on all nodes that could run it. Raises LLMRunError."""
        nodes = [node for node in cluster_nodes() if node.id and could_run(row.placement, node)]
        if row.spec.code or row.spec.requirements:
            await operation.emit("step", row.name, "installing code and requirements on the nodes")
            await call_all(nodes, lambda node: agent_on(node.id).install.remote(row.spec), PREPARE_TIMEOUT_S)
        if row.pin and not lazy:
            await self._weights.distribute(row.pin, row.spec.env, nodes, operation, row.name)

    async def _prove_and_activate(self, row: Deployed, request: DeployRequest, operation: Operation) -> None:
        """Activate a version if its proof succeeds. Else the old one stays.

        Without capacity for a proof, a version is activated only if it replaces no proven one.
        """
        old = self._models.deployed.get(row.name)
        try:
            cause = await self._prover.free_capacity(row, old, operation)
            if cause and not (old and old.proven):
                await self._activate(row, request.source)
                text = f"version {row.version} deployed, not proven: {cause}"
                await operation.emit("unproven", row.name, text)
            elif cause or (cause := await self._prover.prove(row, operation)):
                await self._database.run(self._database.put_version, row, active=False)
                self._models.candidates[row.name] = Candidate(row, cause)
                kept = f"; version {old.version} stays active" if old else ""
                await operation.emit("failed", row.name, f"{cause}{kept} (details: `llmrun logs {row.name}`)")
            else:
                if old:
                    await self._prover.match(row, old, operation)
                await self._activate(replace(row, proven=True), request.source)
                await operation.emit("ready", row.name, f"version {row.version}")
        finally:
            # Also after an error, the application of the active version stays.
            active = self._models.deployed.get(row.name)
            for version in (old, row):
                if version and not (active and active.engine_version == version.engine_version):
                    await self._serve_apps.delete(version.name, version.engine_version)
            self._models.unlock(row.name)
            self._autoscaler.kick()

    async def _replace_active(self, row: Deployed, source: str) -> None:
        """Activate a version and drain the one before."""
        old = self._models.deployed.get(row.name)
        await self._activate(row, source)
        if old and old.engine_version != row.engine_version:
            await self._serve_apps.delete(old.name, old.engine_version)

    async def _activate(self, row: Deployed, source: str) -> None:
        """Store a version as the active one, and send requests to it."""
        self.sources[row.app] = source
        await self._database.run(self._database.put_app, row.app, source)
        await self._database.run(self._database.put_version, row, active=True)
        self._autoscaler.activate(row)
        self._adapters.activate(row.name)

    async def delete(self, models: list[str]) -> None:
        """Remove models. Raises Refused while a deploy runs."""
        if self._lock.locked():
            raise Refused("a deploy is running. Try again when it has finished (see `llmrun status`)", 409)
        async with self._lock:
            await self._remove(models)

    async def _remove(self, models: list[str]) -> None:
        """Remove models and drain their replicas."""
        rows = [self._models.deployed[name] for name in models if name in self._models.deployed]
        await self._database.run(self._database.remove, models)
        for name in models:
            self._models.candidates.pop(name, None)
        for row in rows:
            self._autoscaler.remove(row.name)
            await self._serve_apps.delete(row.name, row.engine_version)
        apps = {row.app for row in self._models.deployed.values()}
        self.sources = {app: source for app, source in self.sources.items() if app in apps}
