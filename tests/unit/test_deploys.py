"""Deploys, with a fake Serve: what a redeploy keeps."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from llmrun.settings import Settings
from llmrun.wire import DeployRequest, Event
from llmrun_runtime.control.autoscaling import serve_apps as serve_apps_module
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.autoscaling.serve_config import app_name
from llmrun_runtime.control.operations import deploy as deploy_module
from llmrun_runtime.control.operations import proof as proof_module
from llmrun_runtime.control.operations.deploy import Deployer
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.placement import Node, Placement
from tests.support import factories


class Cluster:
    """A deployer over nodes with free CPUs; stands for Serve, the autoscaler and the catalogs too.

    A target's replicas are ready at once, as long as CPUs are free.
    """

    def __init__(self, folder: Path) -> None:
        self.registry, self.models = Registry(), Models()
        self.targets: dict[tuple[str, int], int] = {}
        self.deleted: list[tuple[str, int]] = []
        self.cpus = 2
        self.adapters_error: Exception | None = None
        self.database = Database(f"sqlite:///{folder}/control.db")
        this: Any = self
        adapters: Any = _Adapters(this)
        self.deployer = Deployer(
            settings=Settings(home=folder, place_timeout=0.2),
            database=self.database,
            registry=self.registry,
            models=self.models,
            autoscaler=this,
            serve_apps=this,
            weights=this,
            adapters=adapters,
            operations=Operations(),
        )

    @property
    def free(self) -> float:
        """Return the CPUs that no replica uses."""
        return self.cpus - len(self.registry.replicas)

    def nodes(self) -> list[Node]:
        """Return the node."""
        return [Node("n", "n", {"CPU": self.cpus}, {"CPU": self.free})]

    async def set_target(self, row: Deployed, replicas: int) -> None:
        """Set a target; as many replicas as fit are ready at once."""
        self.targets[row.name, row.engine_version] = replicas
        running = [r.id for r in self.registry.replicas_of(row.name, row.engine_version)]
        for replica in running[replicas:]:
            self.registry.remove(replica)
        for number in range(len(running), replicas):
            if self.free >= row.placement.cpus:
                report = factories.report("ready", f"v{row.version}-{number}", model=row.name, version=row.version)
                self.registry.report(report, time.monotonic())
                self.deployer.on_report(report)

    async def delete(self, model: str, version: int) -> None:
        """Delete an application."""
        self.deleted.append((model, version))
        for report in self.registry.replicas_of(model, version):
            self.registry.remove(report.id)

    async def last_error(self, model: str, version: int) -> str:
        """Return no error."""
        return ""

    def activate(self, row: Deployed) -> None:
        """Activate a version."""
        self.models.put(row)

    def kick(self) -> None:
        """Do nothing."""

    def shortage(self, row: Deployed, nodes: Any = None) -> str:
        """Return a text."""
        return "not enough capacity: it needs more"

    async def deploy(self, version: int, cpus: float = 1, **options: Any) -> list[Event]:
        """Prove and activate a version; return the events."""
        spec = factories.spec("one", cpus=cpus, **options)
        row = Deployed("app", version, version, spec, Placement(cpus, 0), proven=False)
        operation = Operation()
        try:
            await self.deployer._prove_and_activate(row, DeployRequest(app="app", source="app.py", specs=()), operation)
        finally:
            await operation.emit("end")
        return [event async for event in operation.events()]


class _Adapters:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def activate(self, model: str) -> None:
        if self._cluster.adapters_error:
            raise self._cluster.adapters_error


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path)
    for module in (deploy_module, proof_module):
        monkeypatch.setattr(module, "cluster_nodes", cluster.nodes)
    monkeypatch.setattr(proof_module, "SETTLE_S", 0.1)
    monkeypatch.setattr(proof_module, "POLL_S", 0.01)
    return cluster


async def test_a_redeploy_takes_over_with_as_many_replicas_as_before(cluster: Cluster) -> None:
    cluster.cpus = 6
    await cluster.deploy(1, max_replicas=4)
    await cluster.set_target(cluster.models.deployed["one"], 3)
    await cluster.deploy(2, max_replicas=4)
    assert cluster.targets["one", 2] == 3 and len(cluster.registry.ready("one", 2)) == 3
    assert cluster.deleted == [("one", 1)] and cluster.models.deployed["one"].version == 2


async def test_a_redeploy_takes_over_with_the_replicas_that_fit(cluster: Cluster) -> None:
    cluster.cpus = 5
    await cluster.deploy(1, max_replicas=4)
    await cluster.set_target(cluster.models.deployed["one"], 3)
    events = await cluster.deploy(2, max_replicas=4)
    assert "continuing with 2 of 3 replicas: not enough capacity for more" in [event.text for event in events]
    assert cluster.targets["one", 2] == 2 and cluster.models.deployed["one"].version == 2


async def test_a_proven_version_is_not_given_up_for_one_without_room(cluster: Cluster) -> None:
    await cluster.deploy(1)
    events = await cluster.deploy(2, cpus=3)
    failed = next(event.text for event in events if event.kind == "failed")
    assert "not enough capacity: it needs more; version 1 stays active" in failed
    assert cluster.models.deployed["one"].version == 1 and cluster.deleted == [("one", 2)]
    assert cluster.registry.ready("one", 1)


async def test_all_replicas_of_a_node_make_room_for_a_larger_version(cluster: Cluster) -> None:
    await cluster.deploy(1, max_replicas=2)
    await cluster.set_target(cluster.models.deployed["one"], 2)
    await cluster.deploy(2, cpus=2)
    assert cluster.models.deployed["one"].version == 2 and cluster.models.deployed["one"].proven


async def test_a_version_that_became_active_keeps_its_application_whatever_fails_then(cluster: Cluster) -> None:
    await cluster.deploy(1)
    cluster.adapters_error = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        await cluster.deploy(2)
    assert cluster.models.deployed["one"].version == 2
    assert cluster.deleted == [("one", 1)] and cluster.registry.ready("one", 2)


async def test_an_application_that_serve_does_not_delete_is_deleted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def delete(name: str) -> None:
        calls.append(name)
        if len(calls) < 3:
            raise RayServeException("the controller is restarting")

    monkeypatch.setattr(serve_apps_module, "_delete", delete)
    monkeypatch.setattr(serve_apps_module, "RETRY_S", 0.01)
    apps = ServeApps(Settings(home=tmp_path))
    apps._targets[app_name("one", 1)] = 1
    await apps.delete("one", 1)
    async with asyncio.timeout(5):
        while apps._deleting:
            await asyncio.sleep(0.01)
    assert len(calls) == 3 and not apps.target("one", 1)
