"""Control's parts, wired together; no actor, no HTTP."""

from __future__ import annotations

import asyncio
import logging

import ray
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import SQLAlchemyError

from llmrun.errors import ClusterError
from llmrun.settings import Settings
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.autoscaling.warm_nodes import WarmNodes, prestart
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.metrics import ControlMetrics
from llmrun_runtime.control.operations.adapter_push import AdapterPushes
from llmrun_runtime.control.operations.deploy import Deployer
from llmrun_runtime.control.operations.weights import WeightsOperations
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.operation import Operations
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.control.usage import Usage
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.ray_nodes import cluster_nodes
from llmrun_runtime.wire.reports import RemoteUsage, Subject, key_subject, model_subject
from llmrun_runtime.wire.routing_table import digest_of

log = logging.getLogger("llmrun.control")
AGENT_TIMEOUT_S = 30


class ControlPlane:
    """Control without Ray's actor around it."""

    def __init__(self, settings: Settings, url: str, address: tuple[str, int]) -> None:
        self.url = url
        settings.make_home()
        self.admin_key = settings.resolved_admin_key()
        if not self.admin_key:  # an empty one would let everybody run code
            raise ClusterError(f"{settings.admin_key_file} is empty: remove it, and a new key is made")
        try:
            self.database = Database(settings.resolved_database_url())
        except (SQLAlchemyError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ClusterError(f"the database cannot be used ({reason}): see LLMRUN_DATABASE_URL") from error
        registry = CollectorRegistry()
        self.starts = ColdStarts(self.database, registry)
        self.keys = Keys(self.database)
        self.usage = Usage(self.database)
        self.registry = Registry()
        self.serving = ServeApps(settings)
        admin = digest_of(self.admin_key)
        self.scaling = Autoscaler(self.serving, self.registry, self.starts, self.keys, address, admin)
        self.jobs = Operations()
        self.stock = WeightsCatalog(self.scaling)
        self.adapters = AdaptersCatalog(self.scaling, self.stock, self.database)
        self.errands = WeightsOperations(self.stock, self.jobs)
        self.pushes = AdapterPushes(settings.root / "pushes", self.scaling, self.adapters, self.jobs)
        self.deployer = Deployer(
            settings, self.database, self.registry, self.scaling, self.serving, self.stock, self.adapters, self.jobs
        )
        self.warming = WarmNodes(
            self.scaling,
            self.registry,
            self.jobs,
            settings.node_idle_timeout,
            lambda: str(ray.get_runtime_context().get_node_id()),
        )
        self.metrics = ControlMetrics(registry, self.scaling, self.registry, self.starts)
        self.usage.on_new = self.metrics.used
        self.scaling.on_proven = lambda row: self.database.put_version(row, in_force=True)
        self.scaling.on_wake = lambda row: prestart(row.placement, self.serving.config(row))

    async def load(self) -> None:
        """Take up what is stored, and what outlived an earlier control; end what is in force no more."""
        self.keys.load()
        self.usage.load()
        rows, self.deployer.sources = self.database.load()
        for row in rows.values():
            self.scaling.put(row)
        self.adapters.load()
        in_force = {(row.name, row.engine_version) for row in rows.values()}
        for model, version in await self.serving.load():
            if (model, version) not in in_force:
                log.warning("ending %s v%d, which is not in force", model, version)
                await self.serving.delete(model, version)

    def living(self) -> list[tuple[str, str, float]]:
        """The replicas that live, each with its model and the GPUs that it holds."""
        deployed = self.scaling.deployed
        reports = (report for report, _ in self.registry.replicas.values())
        return [(r.id, r.model, deployed[r.model].placement.all_gpus) for r in reports if r.model in deployed]

    def elsewhere(self, ingress: str, now: float) -> dict[Subject, RemoteUsage]:
        """Of all with limits, what that ingress cannot see."""
        limited = {key_subject(key.name): key.tpm for key in self.keys.routes.values() if key.limited}
        specs = (row.spec for row in self.scaling.deployed.values())
        limited |= {model_subject(spec.name): spec.tpm for spec in specs if spec.rpm or spec.tpm or spec.max_in_flight}
        found = {}
        for subject, tpm in limited.items():
            spent = self.registry.spent_elsewhere(ingress, subject)
            tokens, wait = self.usage.tokens(subject, tpm, now) if tpm else (0, 0)
            found[subject] = RemoteUsage(spent.requests, spent.in_flight, tokens, wait)
        return {subject: row for subject, row in found.items() if row != RemoteUsage()}

    async def read_logs(
        self, model: str, offsets: dict[str, dict[str, int]], tail: int
    ) -> dict[str, dict[str, tuple[int, str]]]:
        """New log text by node and file."""
        nodes = [node.id for node in cluster_nodes() if node.id]
        calls = [agent_on(node).logs.remote(model, offsets.get(node, {}), tail) for node in nodes]
        async with asyncio.timeout(AGENT_TIMEOUT_S):
            return dict(zip(nodes, await asyncio.gather(*calls), strict=True))
