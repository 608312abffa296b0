"""Deploys, with a fake Serve: what a redeploy keeps."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from llmrun.errors import EngineError, Refused
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun.wire import DeployRequest, Event
from llmrun_runtime.control.autoscaling import serve_apps as serve_apps_module
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.autoscaling.serve_config import app_name
from llmrun_runtime.control.operations import deploy as deploy_module
from llmrun_runtime.control.operations import proof as proof_module
from llmrun_runtime.control.operations import rollout as rollout_module
from llmrun_runtime.control.operations.deploy import Deployer
from llmrun_runtime.control.operations.rollout import Rollout
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
        self.held: set[str] = set()
        """Models whose replicas start, but do not become ready."""
        self.failing: dict[tuple[str, int], str] = {}
        """Why the replicas of a model's version fail."""
        self.database = Database(f"sqlite:///{folder}/control.db")
        this: Any = self
        adapters: Any = _Adapters(this)
        self.operations = Operations()
        self.tasks: list[asyncio.Future[None]] = []
        self.rollout = Rollout(
            settings=Settings(home=folder, place_timeout=0.2),
            database=self.database,
            registry=self.registry,
            models=self.models,
            autoscaler=this,
            serve_apps=this,
            weights=this,
            adapters=adapters,
        )
        self.deployer = Deployer(
            rollout=self.rollout,
            database=self.database,
            models=self.models,
            weights=this,
            adapters=adapters,
            operations=self.operations,
        )

    @property
    def free(self) -> float:
        """Return the CPUs that no replica uses."""
        return self.cpus - len(self.registry.replicas)

    def nodes(self) -> list[Node]:
        """Return the node."""
        return [Node("n", "n", {"CPU": self.cpus}, {"CPU": self.free})]

    async def set_target(self, row: Deployed, replicas: int, avoid: frozenset[str] = frozenset()) -> None:
        """Set a target; as many replicas as fit are ready at once."""
        self.targets[row.name, row.engine_version] = replicas
        running = [r.id for r in self.registry.replicas_of(row.name, row.engine_version)]
        for replica in running[replicas:]:
            self.registry.remove(replica)
        cause = self.failing.get((row.name, row.version), "")
        state = "starting" if row.name in self.held or cause else "ready"
        for number in range(len(running), replicas):
            if self.free >= row.placement.cpus:
                replica = f"{row.name}-v{row.version}-{number}"
                report = factories.report(state, replica, model=row.name, version=row.version)
                if not cause:
                    self.registry.report(report, time.monotonic())
                self.deployer.on_report(report, cause)

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

    async def wait_until_routed(self, model: str) -> None:
        """Do not wait: there is no ingress."""

    def remove(self, model: str) -> None:
        """Remove a model's active version."""
        self.models.remove(model)

    def warm(self, model: str) -> None:
        """Start a replica of the active version."""
        self.tasks.append(asyncio.ensure_future(self.set_target(self.models.deployed[model], 1)))

    async def pin(self, *_: Any, fresh: bool) -> None:
        """Return no pin: weights are used in place."""

    @contextlib.contextmanager
    def protect(self, pin: Any) -> Iterator[None]:
        """Do nothing."""
        yield

    def kick(self) -> None:
        """Do nothing."""

    def shortage(self, row: Deployed, nodes: Any = None) -> str:
        """Return a text."""
        return "not enough capacity: it needs more"

    async def start(self, *names: str, app: str = "app", **options: Any) -> Operation:
        """Start a deploy of these models, with options of the request, or of all models (`cpus`, `aliases`)."""
        spec_options = {key: options.pop(key) for key in ("cpus", "aliases") if key in options}
        specs = tuple(factories.spec(name, **{"cpus": 1, "accelerator": "cpu"} | spec_options) for name in names)
        return await self.deployer.start(DeployRequest(app=app, source=f"{app}.py", specs=specs, **options))

    async def run(self, *names: str, **options: Any) -> list[Event]:
        """Start such a deploy and wait until it ends."""
        return [event async for event in (await self.start(*names, **options)).events()]

    async def deploy(self, version: int, cpus: float = 1, *, force: bool = False, **options: Any) -> list[Event]:
        """Prove and activate a version; return the events."""
        spec = factories.spec("one", cpus=cpus, **options)
        row = Deployed("app", version, version, spec, Placement(cpus, 0), proven=False)
        operation = Operation()
        try:
            request = DeployRequest(app="app", source="app.py", specs=(), force=force)
            await self.rollout.prove_and_activate(row, request, operation, [])
        finally:
            await operation.emit("end")
        return [event async for event in operation.events()]


class _Adapters:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def activate(self, model: str) -> None:
        if self._cluster.adapters_error:
            raise self._cluster.adapters_error

    async def with_max_rank(self, spec: ModelSpec, *_: Any, fresh: bool) -> ModelSpec:
        return spec


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path)
    monkeypatch.setattr(rollout_module, "real_nodes", cluster.nodes)
    for module in (deploy_module, proof_module):
        monkeypatch.setattr(module, "cluster_nodes", cluster.nodes)
    monkeypatch.setattr(proof_module, "SETTLE_S", 0.1)
    monkeypatch.setattr(proof_module, "POLL_S", 0.01)
    monkeypatch.setattr(proof_module, "CAPACITY_POLL_S", 0.01)
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


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def texts(events: list[Event], kind: str) -> list[str]:
    return [f"{event.model}: {event.text}" if event.model else event.text for event in events if event.kind == kind]


async def test_deploys_of_different_apps_run_side_by_side(cluster: Cluster) -> None:
    cluster.held.add("slow")
    slow = await cluster.start("slow", app="first")
    await until(lambda: cluster.registry.replicas_of("slow"))
    assert texts(await cluster.run("fast", app="second"), "ready") == ["fast: version 1"]
    await cluster.deployer.delete(["fast"])
    assert "fast" not in cluster.models.deployed and slow.state == "running"
    slow.cancel("a test")


async def test_a_second_deploy_of_an_app_waits_for_the_first(cluster: Cluster) -> None:
    cluster.held.add("one")
    first = await cluster.start("one")
    second, third = await cluster.start("one"), await cluster.start("one")
    await until(lambda: third.last)
    assert second.last == third.last == f"waiting for the deploy of app (id {first.id}) to finish"
    second.cancel("ann@laptop")
    assert [event.text async for event in second.events()][-2:] == ["cancelled by ann@laptop", ""]
    assert first.state == "running" and third.state == "running"
    await until(lambda: cluster.registry.replicas_of("one"))
    cluster.held.clear()
    await cluster.set_target(cluster.models.candidates["one"].row, 0)
    await cluster.set_target(cluster.models.candidates["one"].row, 1)
    assert [event.kind async for event in first.events()][-2:] == ["ready", "end"]
    events = [event async for event in third.events()]
    assert texts(events, "failed") == [deploy_module.PLAN_CHANGED]
    assert [operation.state for operation in cluster.operations.deploys()] == ["failed", "cancelled", "finished"]


async def test_a_deploy_that_nobody_confirmed_does_what_its_file_says(cluster: Cluster) -> None:
    """A pipeline has nobody who could run the command again."""
    cluster.held.add("one")
    first = await cluster.start("one")
    second = await cluster.start("one", cpus=0.5, unattended=True)
    await until(lambda: second.last)
    first.cancel("a test")
    cluster.held.clear()
    events = [event async for event in second.events()]
    assert second.state == "finished" and texts(events, "ready")
    third = await cluster.start("one", "two", unattended=True)
    fourth = await cluster.start("one", unattended=True, prune=True)
    assert [event.kind async for event in third.events()][-2:] == ["ready", "end"]
    events = [event async for event in fourth.events()]
    assert "have changed since the diff was shown: continuing" in " ".join(texts(events, "step"))
    assert set(cluster.models.deployed) == {"one"}


async def test_an_engine_on_several_nodes_needs_a_trusted_network(cluster: Cluster) -> None:
    spec = factories.spec("wide", accelerator=None, gpus=4, nodes=2)
    request = DeployRequest(app="app", source="app.py", specs=(spec,))
    with pytest.raises(Refused, match=r"wide: nodes=2 lets every machine.*LLMRUN_TRUSTED_NETWORK=1"):
        await cluster.deployer.start(request)
    cluster.deployer._trusted_network = True
    with pytest.raises(Refused, match=r"no node has 2 nodes"):
        await cluster.deployer.start(request)


async def test_a_name_that_another_app_is_deploying_is_refused(cluster: Cluster) -> None:
    cluster.held.add("one")
    first = await cluster.start("one", app="first")
    with pytest.raises(Refused, match=rf"two: the name 'one' is being deployed by app first \(deploy {first.id}\)"):
        await cluster.start("two", aliases=["one"], app="second")
    first.cancel("a test")
    await until(lambda: first.ended)
    assert texts(await cluster.run("two", aliases=["one"], app="second"), "ready")


async def test_models_of_an_app_that_is_being_deployed_are_not_deleted(cluster: Cluster) -> None:
    await cluster.run("one", "two")
    cluster.held.add("one")
    deploy = await cluster.start("one", "two", cpus=0.5)
    with pytest.raises(Refused, match=rf"a deploy of app is running.*`llmrun deploy cancel {deploy.id}`"):
        await cluster.deployer.delete(["two"])
    deploy.cancel("a test")
    await until(lambda: deploy.ended)
    await cluster.deployer.delete(["two"])


async def test_a_cancelled_deploy_leaves_the_version_in_force(cluster: Cluster) -> None:
    await cluster.run("one")
    cluster.held.add("one")
    deploy = await cluster.start("one", "two", cpus=0.5)
    await until(lambda: cluster.registry.replicas_of("one", 2))
    deploy.cancel("ann@laptop")
    events = [event async for event in deploy.events()]
    assert texts(events, "failed") == ["cancelled by ann@laptop"] and deploy.state == "cancelled"
    assert cluster.deleted == [("one", 2)] and not cluster.models.candidates
    assert cluster.models.deployed["one"].version == 1 and "two" not in cluster.models.deployed
    with pytest.raises(Refused, match=r"it has ended \(cancelled\)"):
        deploy.cancel("again")
    cluster.held.clear()
    assert "one: version 3" in texts(await cluster.run("one", cpus=0.5), "ready")  # Serve has deleted version 2


async def test_a_cancelled_switch_is_finished_first(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await cluster.run("one")
    release, delete = asyncio.Event(), cluster.delete

    async def slow_delete(model: str, version: int) -> None:
        await release.wait()
        await delete(model, version)

    monkeypatch.setattr(cluster, "delete", slow_delete)
    deploy = await cluster.start("one", cpus=0.5)
    await until(lambda: cluster.models.deployed["one"].version == 2)
    deploy.cancel("ann@laptop")
    await asyncio.sleep(0.05)
    assert not deploy.ended
    release.set()
    await until(lambda: deploy.ended)
    assert cluster.deleted == [("one", 1)] and cluster.models.deployed["one"].version == 2


async def test_a_renamed_model_replaces_the_old_one_after_its_proof(cluster: Cluster) -> None:
    await cluster.run("old")
    events = await cluster.run("new", prune=True)
    assert [event.kind for event in events if event.kind in ("ready", "removed")] == ["ready", "removed"]
    assert list(cluster.models.deployed) == ["new"]
    cluster.failing["newer", 1] = "out of memory"
    events = await cluster.run("newer", prune=True)
    assert texts(events, "warning") == ["kept new, though no longer in the file, because other models failed"]
    assert list(cluster.models.deployed) == ["new"] and cluster.registry.ready("new", 1)


async def test_a_renamed_model_takes_over_the_aliases_at_the_switch(cluster: Cluster) -> None:
    await cluster.run("old", aliases=["org/model"])
    events = await cluster.run("new", aliases=["org/model"], prune=True)
    assert [event.kind for event in events if event.kind in ("ready", "removed")] == ["removed", "ready"]
    assert "new: removing old: its names now belong to new" in texts(events, "step")
    cluster.failing["newer", 1] = "out of memory"
    await cluster.run("newer", aliases=["org/model"], prune=True)
    assert list(cluster.models.deployed) == ["new"]


async def test_a_renamed_model_without_room_takes_that_of_the_old_one(cluster: Cluster) -> None:
    cluster.cpus = 1
    await cluster.run("old")
    events = await cluster.run("new", prune=True)
    assert "new: not enough capacity next to old, no longer in the file: removing that first" in texts(events, "step")
    assert texts(events, "ready") == ["new: version 1"] and list(cluster.models.deployed) == ["new"]


async def test_a_deploy_without_room_says_what_force_does(cluster: Cluster) -> None:
    await cluster.deploy(1)
    cluster.registry.report(factories.report("ready", "other", model="other"), time.monotonic())
    failed = texts(await cluster.deploy(2, cpus=2), "failed")[0]
    assert "stays active. With --force, it is drained before the proof" in failed


async def test_force_puts_the_old_version_back_if_the_new_one_fails(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.deploy(1)
    cluster.failing["one", 2] = "out of memory"

    async def no_room(*_: Any) -> str:
        return "not enough capacity"

    monkeypatch.setattr(cluster.rollout.prover, "free_capacity", no_room)
    events = await cluster.deploy(2, force=True)
    assert "one: draining version 1 first (--force), requests are queued" in texts(events, "step")
    assert texts(events, "failed")[0].startswith("one: out of memory; version 1 stays active (details")
    assert cluster.models.deployed["one"].version == 1 and cluster.deleted == [("one", 2)]
    cluster.failing.clear()
    assert texts(await cluster.deploy(3, force=True), "ready") == ["one: version 3"]
    assert cluster.models.deployed["one"].proven and cluster.deleted == [("one", 2), ("one", 1)]


async def test_two_proofs_do_not_count_on_the_same_resources(cluster: Cluster) -> None:
    cluster.cpus = 1
    placed = asyncio.Event()
    set_target = cluster.set_target

    async def late(row: Deployed, replicas: int) -> None:
        await placed.wait()
        await set_target(row, replicas)

    cluster.set_target = late  # type: ignore[method-assign, assignment]
    first = await cluster.start("one", app="first")
    await until(lambda: "placing" in first.last)
    assert "two: version 1 deployed, not proven: not enough" in texts(await cluster.run("two"), "unproven")[0]
    placed.set()
    assert [event.kind async for event in first.events()][-2:] == ["ready", "end"]


async def test_a_node_that_cannot_install_code_is_a_warning(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node(name, name, {"CPU": 1}, {"CPU": 1}) for name in "ab"]
    failing = {"a"}

    class Agent:
        def __init__(self, node: str) -> None:
            self._node, self.install = node, self

        async def remote(self, *_: Any) -> None:
            if self._node in failing:
                raise EngineError("no uv")

    monkeypatch.setattr(rollout_module, "agent_on", Agent)
    row, operation = factories.deployed(factories.spec()), Operation()
    assert await cluster.rollout._install(row, nodes, operation) == nodes[1:]
    assert operation.last == "one: node a: cannot install code and requirements: no uv. Tried again when it wakes there"
    failing.add("b")
    with pytest.raises(EngineError, match="on enough nodes: node a: no uv; node b: no uv"):
        await cluster.rollout._install(row, nodes, operation)


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
