"""Creates and connects the parts of control, independent of Ray's actor and of HTTP."""

from __future__ import annotations

import asyncio
import logging

import ray
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import SQLAlchemyError

from llmrun.errors import ClusterError
from llmrun.settings import Settings
from llmrun_runtime.control.audit import AuditLog
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.autoscaling.warm_nodes import WarmNodes, expect_replica, prestart
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.catalog.node_agents import call_each
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.database_check import check_database
from llmrun_runtime.control.disk_watch import DiskWatch
from llmrun_runtime.control.hung_replicas import HungReplicas
from llmrun_runtime.control.keys import AdminSecret, Keys
from llmrun_runtime.control.metrics import ControlMetrics
from llmrun_runtime.control.operations.adapter_push import AdapterPushes
from llmrun_runtime.control.operations.deploy import Deployer
from llmrun_runtime.control.operations.rollout import Rollout
from llmrun_runtime.control.operations.weights import WeightsOperations
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Candidate, Deployed, Models
from llmrun_runtime.control.state.operation import Operations
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.control.usage import Usage
from llmrun_runtime.node.agent import agent_of
from llmrun_runtime.ray_nodes import NodeSnapshot, real_nodes
from llmrun_runtime.wire.reports import RemoteUsage, ReplicaReport, Subject, key_subject, model_subject

log = logging.getLogger("llmrun.control")
STORE_RETRY_S = 5.0


def own_node() -> str:
    """Return the id of the node that control runs on: the head node."""
    return str(ray.get_runtime_context().get_node_id())


class ControlPlane:
    """The parts of control. Their state is in memory; `load` restores the stored part."""

    def __init__(self, settings: Settings, url: str, address: tuple[str, int]) -> None:
        self.url = url
        settings.make_home()
        admin = AdminSecret(settings)
        try:
            self.database = Database(settings.resolved_database_url())
        except (SQLAlchemyError, ImportError) as error:  # the URL is invalid, or its driver is missing
            reason = str(error).splitlines()[0]
            raise ClusterError(f"cannot open the database: {reason}. Check LLMRUN_DATABASE_URL") from error
        metrics = CollectorRegistry()
        self.audit = AuditLog(settings.root)
        self.cold_starts = ColdStarts(self.database, metrics)
        self.disk_watch = DiskWatch()
        metrics.register(self.disk_watch)
        self.keys = Keys(self.database, settings.require_key, admin)
        self.usage = Usage(self.database)
        self.registry = Registry()
        self.models = Models()
        self.serve_apps = ServeApps(settings)
        self.nodes = NodeSnapshot()
        self.autoscaler = Autoscaler(
            models=self.models,
            serve_apps=self.serve_apps,
            registry=self.registry,
            cold_starts=self.cold_starts,
            keys=self.keys,
            nodes=self.nodes.nodes,
            head=own_node,
            control=address,
        )
        self.hung_replicas = HungReplicas(self.registry, self.autoscaler.replica_hung)
        self.operations = Operations()
        self.weights = WeightsCatalog(self.models)
        self.adapters = AdaptersCatalog(self.models, self.weights, self.database, self.autoscaler.set_adapters)
        self.weights_operations = WeightsOperations(self.weights, self.operations)
        self.adapter_pushes = AdapterPushes(settings.root / "pushes", self.models, self.adapters, self.operations)
        self.rollout = Rollout(
            settings=settings,
            database=self.database,
            registry=self.registry,
            models=self.models,
            autoscaler=self.autoscaler,
            serve_apps=self.serve_apps,
            weights=self.weights,
            adapters=self.adapters,
        )
        self.deployer = Deployer(
            rollout=self.rollout,
            database=self.database,
            models=self.models,
            weights=self.weights,
            adapters=self.adapters,
            operations=self.operations,
            trusted_network=settings.trusted_network,
        )
        self.warm_nodes = WarmNodes(
            self.models,
            self.registry,
            self.operations,
            settings.node_idle_timeout,
            self.nodes.nodes,
            own_node,
        )
        self.metrics = ControlMetrics(metrics, self.autoscaler, self.registry, self.cold_starts)
        self.autoscaler.on_error = self.metrics.count_error
        self.usage.on_new = self.metrics.count_tokens
        self.autoscaler.on_proven = self._store_proven
        self._storing: set[asyncio.Task[None]] = set()
        self.autoscaler.on_wake = self._prestart
        self.autoscaler.on_eviction = expect_replica

    def _prestart(self, row: Deployed) -> None:
        nodes, freed = self.autoscaler.nodes_for(row), self.autoscaler.freed_nodes(row)
        prestart(row.placement, nodes, self.serve_apps.replica_config(row), freed)

    async def load(self) -> None:
        """Restore the stored state, adopt running applications, delete those of versions that are not active.

        Can be repeated if it fails. Raises ClusterError if the database is not that of the running applications.
        """
        loop = asyncio.get_running_loop()

        def on_change() -> None:  # keys change in the database's thread
            loop.call_soon_threadsafe(self.autoscaler.kick)

        self.keys.on_change = on_change
        try:
            running = await self.serve_apps.load()
            await check_database(self.database, running)
            await self.database.run(self.keys.load)
            await self.database.run(self.usage.load)
            rows, self.rollout.sources = await self.database.run(self.database.load)
            self.autoscaler.unreadable = self.database.unreadable
            for row in rows.values():
                self.autoscaler.activate(row)
            for row, cause in (await self.database.run(self.database.failed)).values():
                self.models.candidates[row.name] = Candidate(row, cause)
            await self.database.run(self.adapters.load)
        except Exception:
            self.database.submit(self.database.disconnect)  # its file may be replaced before the next try
            raise
        active = {(row.name, row.engine_version) for row in rows.values()}
        for model, version in running:
            if (model, version) not in active and model not in self.database.unreadable:
                log.warning("deleting the application of %s v%d: the version is not active", model, version)
                await self.serve_apps.delete(model, version)

    def _store_proven(self, row: Deployed) -> None:
        """Store that a version is proven, as soon as the database can be written."""

        async def store() -> None:
            while True:
                try:
                    return await self.database.run(self.database.mark_proven, row.name, row.version)
                except SQLAlchemyError as error:
                    log.warning("cannot store that %s v%d is proven, retrying: %s", row.name, row.version, error)
                await asyncio.sleep(STORE_RETRY_S)

        task = asyncio.get_running_loop().create_task(store())
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    def live_replicas(self) -> list[tuple[str, str, float]]:
        """Return the registered replicas, each with its model and the number of its GPUs.

        A replica of a replaced version counts with the active version's GPUs, one of a deleted model with none.
        """
        deployed = self.models.deployed
        proving = {(row.name, row.engine_version): row for row in (c.row for c in self.models.candidates.values())}

        def gpus(report: ReplicaReport) -> float:
            row = proving.get((report.model, report.version)) or deployed.get(report.model)
            return row.placement.total_gpus if row else 0

        return [(report.id, report.model, gpus(report)) for report, _ in self.registry.replicas.values()]

    def remote_usage(self, ingress: str, now: float) -> dict[Subject, RemoteUsage]:
        """Return the usage of each subject with limits that the ingress cannot count itself; `now` is monotonic."""
        limited = {key_subject(key.name): key.tpm for key in self.keys.routes.values() if key.limited}
        specs = (row.spec for row in self.models.deployed.values())
        limited |= {model_subject(spec.name): spec.tpm for spec in specs if spec.rpm or spec.tpm or spec.max_in_flight}
        usage = {}
        for subject, tpm in limited.items():
            others = self.registry.usage_elsewhere(ingress, subject)
            tokens, wait = self.usage.tokens(subject, tpm, now) if tpm else (0, 0)
            usage[subject] = RemoteUsage(others.requests, others.in_flight, tokens, wait, others.reserved)
        return {subject: row for subject, row in usage.items() if row != RemoteUsage()}

    async def read_logs(
        self, model: str, offsets: dict[str, dict[str, int]], tail: int
    ) -> dict[str, dict[str, tuple[int, str]]]:
        """Return new log text, by node and file, with the offset to continue from.

        A node whose agent does not run or respond has none.
        """
        nodes, none = await asyncio.to_thread(real_nodes), dict[str, tuple[int, str]]()
        replies = await call_each(
            nodes, lambda node: agent_of(node.id).logs.remote(model, offsets.get(node.id, {}), tail), none
        )
        return {node.id: reply for node, reply in zip(nodes, replies, strict=True)}
