"""Plans and runs deploys: those of one app one after the other, those of different apps side by side."""

from __future__ import annotations

import asyncio
from pathlib import Path

from llmrun.errors import Refused
from llmrun.spec import ModelSpec
from llmrun.wire import DeployRequest, Plan
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.operations.plan import Claim, check, check_claims, make_plan
from llmrun_runtime.control.operations.rollout import Rollout
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.placement import Node, resolve
from llmrun_runtime.ray_nodes import cluster_nodes
from llmrun_runtime.wire.reports import ReplicaReport

PLAN_CHANGED = "the deployed models have changed since the diff was shown. Run the command again"


class Deployer:
    """Plan, deploy and delete models."""

    def __init__(
        self,
        *,
        rollout: Rollout,
        database: Database,
        models: Models,
        weights: WeightsCatalog,
        adapters: AdaptersCatalog,
        operations: Operations,
        trusted_network: bool = False,
    ) -> None:
        self._rollout = rollout
        self._database = database
        self._models = models
        self._weights = weights
        self._adapters = adapters
        self._operations = operations
        self._trusted_network = trusted_network
        self._claims: list[Claim] = []
        """Of the deploys that had not ended at the last look, the oldest first."""

    async def plan(self, request: DeployRequest, *, fresh: bool = True) -> tuple[Plan, dict[str, Deployed]]:
        """Return what a deploy of `request` would do now, and each model as it would become. Raises LLMRunError.

        `fresh`: resolve weights and adapters at their sources now, instead of using the results of the last plan.
        """
        nodes = await asyncio.to_thread(cluster_nodes)
        for spec in request.specs:
            await self._check(spec, nodes)
        placements = {spec.name: resolve(spec, nodes) for spec in request.specs}
        deployed = self._models.deployed
        check(request, deployed, self._rollout.sources)
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
        if spec.nodes > 1 and not self._trusted_network:  # vLLM 0.32 unpickles what its members receive
            raise Refused(
                f"{spec.name}: nodes={spec.nodes} lets every machine on the nodes' network run code on them: "
                f"an engine's members have no credential for each other. If only trusted machines can reach that "
                f"network, start the cluster with LLMRUN_TRUSTED_NETWORK=1",
                409,
            )
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
        if request.plan and request.plan != plan.fingerprint and not request.unattended:
            raise Refused(PLAN_CHANGED, 409)
        check_claims(request, self._running_claims())  # from here to the claim, no other deploy can run
        operation = self._operations.start(
            f"deploy of {request.app}",
            lambda operation: self._deploy(request, plan.fingerprint, operation),
            app=request.app,
            by=request.by,
        )
        self._claims.append(Claim.of(request, operation))
        return operation

    def on_report(self, report: ReplicaReport, cause: str = "") -> bool:
        """Process a replica's report, with the cause if it failed. Return whether the replica belongs to a proof."""
        return self._rollout.prover.on_report(report, cause)

    async def _deploy(self, request: DeployRequest, fingerprint: str, operation: Operation) -> None:
        while earlier := self._earlier_deploy(operation):
            text = f"waiting for the deploy of {request.app} (id {earlier.id}) to finish"
            await operation.emit("step", text=text)
            assert earlier.task
            await asyncio.wait({earlier.task})
        plan, rows = await self.plan(request, fresh=False)
        if plan.fingerprint != fingerprint:
            if not request.unattended:
                raise Refused(PLAN_CHANGED, 409)
            await operation.emit("step", text="the deployed models have changed since the diff was shown: continuing")
        await self._apply(plan, rows, request, operation)

    def _running_claims(self) -> list[Claim]:
        self._claims = [claim for claim in self._claims if not claim.operation.ended]
        return self._claims

    def _earlier_deploy(self, operation: Operation) -> Operation | None:
        """Return the oldest running deploy of the same app, if that is another one."""
        oldest = next(claim.operation for claim in self._running_claims() if claim.operation.app == operation.app)
        return None if oldest is operation else oldest

    async def _apply(self, plan: Plan, rows: dict[str, Deployed], request: DeployRequest, operation: Operation) -> None:
        """Make the changes. A model that is removed goes last, and only if the others succeeded: it may be renamed."""
        removals = [change.model for change in plan.changes if change.kind == "remove" and request.prune]
        failed = False
        for change in plan.changes:
            if change.kind != "remove":
                await self._warn_of_skipped(rows[change.model].spec, operation)
            if change.kind == "tune":
                await self._rollout.tune(rows[change.model], request, operation)
            elif change.kind in ("add", "change"):
                started = await self._rollout.start_version(rows[change.model], request, operation, removals)
                failed = failed or not started
        if failed and removals:
            text = f"kept {', '.join(removals)}, though no longer in the file, because other models failed"
            await operation.emit("warning", text=text)
        elif removals:
            await self._rollout.remove_all(removals, operation)

    async def _warn_of_skipped(self, spec: ModelSpec, operation: Operation) -> None:
        if spec.lora and (skipped := self._adapters.skipped(spec)):
            reasons = "; ".join(f"{name!r}: {reason}" for name, reason in skipped.items())
            await operation.emit("warning", spec.name, f"left out of the adapters in {spec.lora.location}: {reasons}")

    async def delete(self, models: list[str]) -> None:
        """Remove models. Raises Refused while a deploy of their app runs."""
        deployed, candidates = self._models.deployed, self._models.candidates
        rows = [deployed[name] if name in deployed else candidates[name].row for name in models]
        apps = {row.app for row in rows}
        for operation in (claim.operation for claim in self._running_claims()):
            if operation.app in apps:
                raise Refused(
                    f"a deploy of {operation.app} is running. Try again when it has finished, "
                    f"or cancel it with `llmrun deploy cancel {operation.id}`",
                    409,
                )
        await self._rollout.remove(models)
