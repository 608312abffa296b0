"""Brings one version of a model into force: prepares nodes, proves the version and activates it. Removes models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import replace

from sqlalchemy.exc import SQLAlchemyError

from llmrun.errors import EngineError, LLMRunError
from llmrun.settings import Settings
from llmrun.wire import DeployRequest
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.catalog.node_agents import try_each
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.operations.proof import PREPARE_TIMEOUT_S, Prover
from llmrun_runtime.control.operations.weights_nodes import count_weights_nodes, freest_first
from llmrun_runtime.control.state.connection import describe_error
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Candidate, Deployed, Models
from llmrun_runtime.control.state.operation import Operation
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.placement import Node, could_run
from llmrun_runtime.ray_nodes import real_nodes

log = logging.getLogger("llmrun.control")


class Rollout:
    """Starts, activates and removes versions."""

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
    ) -> None:
        self._database = database
        self._models = models
        self._autoscaler = autoscaler
        self._serve_apps = serve_apps
        self._weights = weights
        self._adapters = adapters
        self.prover = Prover(
            settings=settings, registry=registry, models=models, autoscaler=autoscaler, serve_apps=serve_apps
        )
        self.sources: dict[str, str] = {}
        """Where each app was deployed from, as in `DeployRequest.source`."""

    async def tune(self, row: Deployed, request: DeployRequest, operation: Operation) -> None:
        """Activate new options. The running engine stays."""
        active = self._models.deployed[row.name]
        counts = [(spec.weights_nodes, spec.max_replicas) for spec in (active.spec, row.spec)]
        if counts[0] != counts[1] and not request.lazy:
            await self._distribute(replace(active, spec=row.spec), await _able_nodes(active), operation, needed=0)
        number = await self._database.run(self._database.reserve_version, row.name)
        row = replace(active, version=number, spec=row.spec)
        await self._put_active(row, request.source)
        await operation.emit("tuned", row.name, f"version {row.version}, without a restart")

    async def start_version(
        self, row: Deployed, request: DeployRequest, operation: Operation, removals: list[str]
    ) -> bool:
        """Prepare nodes, prove the new version and activate it. Return False if it failed, which is an event.

        `removals`: the models to be removed by this deploy. Those whose names or resources it needs are removed here.
        """
        number = await self._database.run(self._database.reserve_version, row.name)
        row = replace(row, version=number, engine_version=number)
        try:
            with self._weights.protect(row.pin):  # until it is active
                await self._prepare(row, operation, lazy=request.lazy)
                if not request.lazy:
                    return await self.prove_and_activate(row, request, operation, removals)
                with operation.uninterrupted():
                    await self._replace_active(row, request.source, operation, removals)
                    text = f"version {row.version} deployed, not started (--lazy)"
                    await operation.emit("unproven", row.name, text)
        except LLMRunError as error:
            await operation.emit("failed", row.name, str(error))
            return False
        except SQLAlchemyError as error:
            log.exception("version %d of %s could not be stored", row.version, row.name)
            await operation.emit("failed", row.name, describe_error(error))
            return False
        return True

    async def _prepare(self, row: Deployed, operation: Operation, *, lazy: bool) -> None:
        """Install code, requirements and (unless `lazy`) weights on nodes that could run it.

        A node that fails is a warning: it does the same when a replica starts there. Raises LLMRunError if fewer nodes
        are left than a replica needs.
        """
        nodes = await _able_nodes(row)
        if row.spec.code or row.spec.requirements:
            nodes = await self._install(row, nodes, operation)
        if not lazy:
            await self._distribute(row, nodes, operation, needed=min(row.placement.nodes, len(nodes)))

    async def _distribute(self, row: Deployed, nodes: list[Node], operation: Operation, *, needed: int) -> None:
        """Download the weights, if they are not used in place, to as many nodes as the model asks for."""
        if row.pin:
            nodes = freest_first(nodes)
            wanted = count_weights_nodes(row.spec, row.placement, nodes)
            await self._weights.distribute(
                row.pin, row.spec.env, nodes, operation, row.name, wanted=wanted, needed=needed
            )

    async def _install(self, row: Deployed, nodes: list[Node], operation: Operation) -> list[Node]:
        """Install code and requirements. Return the nodes where that succeeded. Raises EngineError."""
        await operation.emit("step", row.name, "installing code and requirements on the nodes")
        replies = await try_each(nodes, lambda node: agent_on(node.id).install.remote(row.spec), PREPARE_TIMEOUT_S)
        failures = [(node, reply) for node, reply in zip(nodes, replies, strict=True) if isinstance(reply, LLMRunError)]
        good = [node for node in nodes if node not in [failed for failed, _ in failures]]
        if failures and len(good) < row.placement.nodes:
            causes = "; ".join(f"node {node.host}: {error}" for node, error in failures)
            raise EngineError(f"cannot install code and requirements on enough nodes: {causes}")
        for node, error in failures:
            text = f"node {node.host}: cannot install code and requirements: {error}. Tried again when it wakes there"
            await operation.emit("warning", row.name, text)
        return good

    async def prove_and_activate(
        self, row: Deployed, request: DeployRequest, operation: Operation, removals: list[str]
    ) -> bool:
        """Activate a version if its proof succeeds. Else the old one stays; return False.

        Without capacity for a proof, a version is activated only if it replaces no proven one, or with `force`.
        """
        old = self._models.deployed.get(row.name)
        try:
            cause = await self._make_room(row, old, operation, removals)
            hint = ""
            if cause and not (old and old.proven):
                with operation.uninterrupted():
                    await self._activate(row, request.source, operation, removals)
                    text = f"version {row.version} deployed, not proven: {cause}"
                    await operation.emit("unproven", row.name, text)
                return True
            if cause and old and request.force:
                cause = await self._prove_in_place(row, old, request, operation)
            elif cause:
                hint = ". With --force, it is drained before the proof: requests wait meanwhile"
            else:
                cause = await self.prover.prove(row, operation)
                if not cause and old:
                    await self.prover.match(row, old, operation)
            if cause:
                await self._database.run(self._database.put_version, row, active=False, cause=cause)
                self._models.candidates[row.name] = Candidate(row, cause)
                kept = f"; version {old.version} stays active{hint}" if old else ""
                await operation.emit("failed", row.name, f"{cause}{kept} (details: `llmrun logs {row.name}`)")
                return False
            with operation.uninterrupted():
                await self._activate(replace(row, proven=True), request.source, operation, removals)
                await operation.emit("ready", row.name, f"version {row.version}")
            return True
        finally:
            with operation.uninterrupted():
                await self._settle(row, old)

    async def _settle(self, row: Deployed, old: Deployed | None) -> None:
        """Delete the application that is not active, also after an error, and release the model."""
        active = self._models.deployed.get(row.name)
        candidate = self._models.candidates.get(row.name)
        if candidate and not candidate.cause:
            del self._models.candidates[row.name]
        for version in (old, row):
            if version and not (active and active.engine_version == version.engine_version):
                await self._serve_apps.delete(version.name, version.engine_version)
        self._models.unlock(row.name)
        self._autoscaler.kick()

    async def _make_room(self, row: Deployed, old: Deployed | None, operation: Operation, removals: list[str]) -> str:
        """Make room for a replica of `row`, if need be in place of models to be removed. Return what is missing."""
        cause = await self.prover.free_capacity(row, old, operation)
        if not cause or not await self.prover.fits_without(row, removals):
            return cause
        names = ", ".join(removals)
        text = f"not enough capacity next to {names}, no longer in the file: removing that first"
        await operation.emit("step", row.name, text)
        removed = list(removals)
        await self._remove_from(removals, removed, operation)
        await self.prover.wait_until_gone(removed)
        return await self.prover.free_capacity(row, old, operation)

    async def _prove_in_place(self, row: Deployed, old: Deployed, request: DeployRequest, operation: Operation) -> str:
        """Activate a version, and drain the old one, before the proof. Return "", or why it failed.

        The old version becomes active again if the proof fails or is cancelled.
        """
        text = f"draining version {old.version} first (--force), requests are queued"
        await operation.emit("step", row.name, text)
        proven = False
        try:
            await self._put_active(row, request.source)
            await self._serve_apps.set_target(old, 0)
            cause = await self.prover.prove(row, operation, in_place=True)
            proven = not cause
        finally:
            if not proven:
                await self._put_active(old, request.source)
        return cause

    async def _replace_active(self, row: Deployed, source: str, operation: Operation, removals: list[str]) -> None:
        """Activate a version and drain the one before."""
        old = self._models.deployed.get(row.name)
        await self._activate(row, source, operation, removals)
        if old and old.engine_version != row.engine_version:
            await self._serve_apps.delete(old.name, old.engine_version)

    async def _activate(self, row: Deployed, source: str, operation: Operation, removals: list[str]) -> None:
        """Store a version as the active one, and send requests to it. Removes the models whose names it takes."""
        deployed, names = self._models.deployed, set(row.spec.served_names)
        taken = [name for name in removals if name in deployed and names & set(deployed[name].spec.served_names)]
        if taken:
            text = f"removing {', '.join(taken)}: its names now belong to {row.name}"
            await operation.emit("step", row.name, text)
        rows = await self._forget(taken)
        await self._put_active(row, source)
        await self._report_removed(rows, removals, operation)

    async def _put_active(self, row: Deployed, source: str) -> None:
        await self._database.run(self._database.put_app, row.app, source)
        await self._database.run(self._database.put_version, row, active=True)
        self.sources[row.app] = source
        self._autoscaler.activate(row)
        self._adapters.activate(row.name)
        await self._autoscaler.wait_until_routed(row.name)  # so that a request right after the deploy is served

    async def remove_all(self, removals: list[str], operation: Operation) -> None:
        """Remove the models of a deploy that are left to remove."""
        with operation.uninterrupted():
            await self._remove_from(removals, list(removals), operation)

    async def _remove_from(self, removals: list[str], names: Collection[str], operation: Operation) -> None:
        await self._report_removed(await self._forget(names), removals, operation)

    async def _report_removed(self, rows: list[Deployed], removals: list[str], operation: Operation) -> None:
        """Delete the applications of removed models, one event for each."""
        for row in rows:
            removals.remove(row.name)
            await self._serve_apps.delete(row.name, row.engine_version)
            await operation.emit("removed", row.name)

    async def remove(self, models: Collection[str]) -> None:
        """Remove models and drain their replicas."""
        for row in await self._forget(models):
            await self._serve_apps.delete(row.name, row.engine_version)

    async def _forget(self, models: Collection[str]) -> list[Deployed]:
        """Remove models at once, except their applications. Return the versions that were active."""
        if not models:
            return []
        rows = [self._models.deployed[name] for name in models if name in self._models.deployed]
        await self._database.run(self._database.remove, models)
        for name in models:
            self._models.candidates.pop(name, None)
        for row in rows:
            self._autoscaler.remove(row.name)
        apps = {row.app for row in self._models.deployed.values()}
        self.sources = {app: source for app, source in self.sources.items() if app in apps}
        return rows


async def _able_nodes(row: Deployed) -> list[Node]:
    """Return the nodes that could run the model."""
    return [node for node in await asyncio.to_thread(real_nodes) if could_run(row.placement, node)]
