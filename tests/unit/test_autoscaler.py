"""The autoscaling loop, with a fake Serve and fake nodes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from llmrun.errors import ClusterError, Refused
from llmrun_runtime.control.autoscaling import autoscaler as autoscaler_module
from llmrun_runtime.control.autoscaling import capacity as capacity_module
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.placement import Node
from llmrun_runtime.wire.reports import ReplicaReport, Traffic
from tests.support import factories


class FakeServe:
    """Accepts targets at once."""

    def __init__(self) -> None:
        self.targets: dict[str, int] = {}

    def target(self, model: str, version: int) -> int:
        """Return the last target."""
        return self.targets.get(model, 0)

    def is_confirmed(self, model: str, version: int) -> bool:
        """Confirm every target."""
        return True

    async def set_target(self, row: Deployed, replicas: int, avoid: frozenset[str] = frozenset()) -> None:
        """Set a target."""
        self.targets[row.name] = replicas


class Cluster:
    """An autoscaler over one node with one CPU."""

    def __init__(self, folder: Path) -> None:
        self.models, self.serve, self.registry = Models(), FakeServe(), Registry()
        self.free = 1
        self.more_nodes: list[Node] = []
        self.database = Database(f"sqlite:///{folder}/control.db")
        self.cold_starts = ColdStarts(self.database, CollectorRegistry())
        serve: Any = self.serve
        self.autoscaler = Autoscaler(
            models=self.models,
            serve_apps=serve,
            registry=self.registry,
            cold_starts=self.cold_starts,
            keys=Keys(self.database),
            nodes=self.nodes,
            head=lambda: "n",
            control=("127.0.0.1", 1),
        )

    def nodes(self) -> list[Node]:
        """Return the node, and more."""
        return [Node("n", "n", {"CPU": 1}, {"CPU": self.free}), *self.more_nodes]

    def deploy(self, name: str, **options: Any) -> None:
        """Activate version 1, which is not proven."""
        self.autoscaler.activate(factories.deployed(factories.spec(name, **options), proven=False))

    def report(self, model: str, state: Any) -> ReplicaReport:
        """Report as the model's replica."""
        report = factories.report(state, f"{model}-r", model=model)
        self.registry.report(report, time.monotonic())
        return report

    def report_waiting(self, **waiting: int) -> None:
        """Report the number of waiting requests by model."""
        traffic = {model: Traffic(count, 0, time.time() if count else 0) for model, count in waiting.items()}
        self.registry.report_traffic("ingress", traffic, time.monotonic())

    async def tick(self) -> None:
        """Run one iteration of the loop, and wait until its targets are set."""
        await self.autoscaler.tick(time.monotonic())
        await asyncio.sleep(0.01)

    def status(self, model: str) -> tuple[str, str]:
        """Return a model's state and cause."""
        return next((row.state, row.cause) for row in self.autoscaler.statuses() if row.name == model)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


async def test_a_request_wakes_a_model_and_its_first_replica_proves_it(cluster: Cluster) -> None:
    woken, proven = [], []
    cluster.autoscaler.on_wake = lambda row: woken.append(row.name)
    cluster.autoscaler.on_proven = lambda row: proven.append(row.name)
    cluster.deploy("one")
    await cluster.tick()
    assert cluster.status("one") == ("cold", "") and cluster.serve.targets == {}
    number = cluster.autoscaler.table.number
    cluster.report_waiting(one=1)
    await cluster.tick()
    assert cluster.serve.targets == {"one": 1} and woken == ["one"] and not proven
    assert cluster.status("one") == ("waking", "")
    cluster.autoscaler.replica_ready(cluster.report("one", "ready"))
    cluster.report_waiting(one=0)
    await cluster.tick()
    row = cluster.models.get("one")
    assert row and row.proven and proven == ["one"] and cluster.status("one") == ("hot", "")
    table = await cluster.autoscaler.watch(cluster.autoscaler.table.epoch, number, 1)
    assert table.number > number and len(table.models["one"].replicas) == 1
    assert cluster.autoscaler.unload("one") == "one"
    await cluster.tick()
    assert cluster.serve.targets == {"one": 0}


async def test_a_locked_model_keeps_its_target(cluster: Cluster) -> None:
    cluster.deploy("one")
    cluster.models.lock("one")
    cluster.report_waiting(one=1)
    await cluster.tick()
    assert cluster.serve.targets == {} and cluster.status("one")[0] == "waking"
    with pytest.raises(Refused, match="locked by a running deploy"):
        cluster.autoscaler.warm("one")
    cluster.models.unlock("one")
    await cluster.tick()
    assert cluster.serve.targets == {"one": 1}


async def test_an_idle_replica_is_evicted_for_a_model_that_wakes(cluster: Cluster) -> None:
    cluster.deploy("idle", min_uptime=0)
    cluster.deploy("kept", min_uptime=0, evictable=False)
    cluster.deploy("one")
    cluster.serve.targets = {"idle": 1, "kept": 1}
    cluster.free = 0
    cluster.report("idle", "ready")
    cluster.report("kept", "ready")
    cluster.report_waiting(one=1)
    prepared: list[frozenset[str]] = []
    woken: list[str] = []
    cluster.autoscaler.on_eviction = prepared.append
    cluster.autoscaler.on_wake = lambda row: woken.append(row.name)
    await cluster.tick()
    assert prepared == [frozenset({cluster.registry.replicas["idle-r"][0].node})] and not woken
    assert cluster.serve.targets == {"idle": 0, "kept": 1, "one": 1}
    assert cluster.status("idle") == ("hot", "evicted to free resources for one")
    state, cause = cluster.status("one")
    assert state == "waking" and cause.startswith("not enough capacity: it needs 1 CPUs") and "idle, kept" in cause
    await cluster.tick()
    assert cluster.status("one")[1] == "waiting for the eviction of idle"
    cluster.registry.remove("idle-r")
    await cluster.tick()
    # Its engine is gone, though Ray does not count that as free yet: the other one can start.
    assert woken == ["one"] and cluster.autoscaler.freed_nodes(cluster.models.deployed["one"]) == prepared[0]
    cluster.free = 1
    await cluster.tick()
    assert cluster.status("one") == ("waking", "") and cluster.serve.targets["one"] == 1
    assert woken == ["one"] and len(prepared) == 1


async def test_a_failed_start_is_counted_and_its_cause_published(cluster: Cluster) -> None:
    cluster.deploy("one")
    cluster.report_waiting(one=1)
    await cluster.tick()
    for _ in range(3):
        cluster.autoscaler.replica_failed(cluster.report("one", "starting"), "out of memory", time.monotonic())
        cluster.registry.remove("one-r")
    await cluster.tick()
    route = cluster.autoscaler.table.models["one"]
    assert (route.failures, route.paused, route.cause) == (3, True, "out of memory")
    assert cluster.serve.targets == {"one": 0} and cluster.status("one") == ("failed", "out of memory")
    with pytest.raises(Refused, match="one failed to start: out of memory"):
        cluster.autoscaler.warm("one")


async def test_replicas_that_started_together_and_fail_count_as_one_failure(cluster: Cluster) -> None:
    cluster.deploy("one", max_replicas=8)
    started = time.monotonic()
    for number in range(8):
        cluster.autoscaler.replica_failed(factories.report("starting", f"r{number}", model="one"), "no store", started)
    await cluster.tick()
    route = cluster.autoscaler.table.models["one"]
    assert route.failures == 1 and not route.paused
    late = factories.report("starting", "late", model="one")
    cluster.autoscaler.replica_failed(late, "no store", time.monotonic())  # Serve started it again, before target 0
    assert cluster.autoscaler._states["one"].failure.count == 1  # type: ignore[union-attr]
    cluster.serve.targets["one"] = 1
    cluster.autoscaler.replica_failed(factories.report("starting", "later", model="one"), "no store", time.monotonic())
    await cluster.tick()
    assert cluster.autoscaler.table.models["one"].failures == 2


async def test_a_node_on_which_starts_fail_is_set_aside_if_another_one_can_run_the_model(cluster: Cluster) -> None:
    cluster.deploy("one")
    cluster.report_waiting(one=1)
    await cluster.tick()

    def fail() -> None:
        cluster.autoscaler.replica_failed(cluster.report("one", "starting"), "no GPU", time.monotonic())
        cluster.registry.remove("one-r")

    fail()
    fail()
    await cluster.tick()
    assert cluster.status("one") == ("failed", "no GPU")  # there is no other node
    cluster.more_nodes = [Node("m", "m", {"CPU": 1}, {"CPU": 1})]
    await cluster.tick()
    _, cause = cluster.status("one")
    assert cause.startswith("no GPU; node h is set aside for 30 min after 2 failed starts")
    row = cluster.models.deployed["one"]
    assert [node.id for node in cluster.autoscaler.nodes_for(row)] == ["m"]
    cluster.deploy("one")  # the same version
    assert [node.id for node in cluster.autoscaler.nodes_for(row)] == ["m"]


async def test_a_fault_of_one_model_stops_no_other_and_keeps_its_last_route(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bad", "good"):
        cluster.deploy(name)
    cluster.report("bad", "ready")
    await cluster.tick()
    route = cluster.autoscaler.table.models["bad"]
    assert route.replicas
    usual = cluster.cold_starts.usual

    def fail_for_bad(model: str) -> float:
        if model == "bad":
            raise ValueError("row 7 is not valid")
        return usual(model)

    monkeypatch.setattr(cluster.cold_starts, "usual", fail_for_bad)
    errors: list[str] = []
    cluster.autoscaler.on_error = errors.append
    cluster.report_waiting(good=1)
    await cluster.tick()
    cluster.report("good", "ready")
    await cluster.tick()
    assert cluster.serve.targets["good"] == 1 and cluster.autoscaler.table.models["good"].replicas
    assert cluster.autoscaler.table.models["bad"] == route
    statuses = {status.name: status for status in cluster.autoscaler.statuses()}
    assert "cannot manage bad: ValueError: row 7 is not valid" in statuses["bad"].cause
    assert errors == ["autoscaler", "autoscaler"]
    monkeypatch.undo()
    await cluster.tick()
    assert not next(status for status in cluster.autoscaler.statuses() if status.name == "bad").cause


async def test_the_first_table_waits_for_the_replicas_that_serve_runs(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.deploy("one")
    cluster.serve.targets["one"] = 1  # control restarted: Serve has a replica that has not reported yet
    await cluster.tick()
    with pytest.raises(TimeoutError):  # an ingress keeps the earlier control's table
        await cluster.autoscaler.watch("an earlier control", 7, 0.01)
    cluster.report("one", "ready")
    await cluster.tick()
    table = await cluster.autoscaler.watch("an earlier control", 7, 1)
    assert table.number == 1 and table.models["one"].replicas


async def test_the_first_table_waits_for_lost_replicas_no_longer_than_that(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.deploy("one")
    cluster.serve.targets["one"] = 1
    monkeypatch.setattr(autoscaler_module, "FIRST_TABLE_S", 0.05)
    await cluster.tick()
    first = cluster.autoscaler.table.number
    await asyncio.sleep(0.06)
    await cluster.tick()
    assert (first, cluster.autoscaler.table.number) == (0, 1)


async def test_ticks_that_fail_for_all_models_are_told_to_ingresses_and_status(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.deploy("one")
    await cluster.tick()
    autoscaler, errors = cluster.autoscaler, list[str]()
    autoscaler.on_error = errors.append
    table = autoscaler.table
    with monkeypatch.context() as broken:
        broken.setattr(autoscaler_module, "FAILING_S", 0.1)
        broken.setattr(Registry, "expire", lambda *_: 1 / 0)
        running = asyncio.create_task(autoscaler.run())
        autoscaler.kick_now()
        assert await autoscaler.watch(table.epoch, table.number, 0.01) is table, "one failing tick is no news"
        await asyncio.sleep(0.2)
        with pytest.raises(ClusterError, match="cannot manage any model: ZeroDivisionError"):
            await autoscaler.watch(table.epoch, table.number, 0.01)
        assert await autoscaler.watch("another control", 7, 0.01) is table
        assert autoscaler.failure and errors
    try:
        autoscaler.kick_now()
        async with asyncio.timeout(5):
            while autoscaler.failure:
                await asyncio.sleep(0.01)
        assert await autoscaler.watch(table.epoch, table.number, 0.01) is table
    finally:
        running.cancel()


async def test_a_deploy_waits_until_every_ingress_has_the_new_table(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoscaler = cluster.autoscaler
    cluster.deploy("one")
    await asyncio.wait_for(autoscaler.wait_until_routed("one"), 0.1)  # there is no ingress
    for ingress in ("a", "b"):
        cluster.registry.report_traffic(ingress, {}, time.monotonic())
    waiting = asyncio.create_task(autoscaler.wait_until_routed("one"))
    await cluster.tick()
    table = autoscaler.table
    for _ in range(2):
        assert not waiting.done()
        await autoscaler.watch(table.epoch, table.number - 1, 0.01)  # an ingress with the table before
        await autoscaler.watch(table.epoch, table.number, 0.01)
        await asyncio.sleep(0.01)
    await asyncio.wait_for(waiting, 0.1)
    monkeypatch.setattr(autoscaler_module, "ROUTED_S", 0.05)
    cluster.deploy("other")  # its table is never published
    await asyncio.wait_for(autoscaler.wait_until_routed("other"), 0.5)


async def test_a_draining_replica_waits_until_no_ingress_routes_to_it(cluster: Cluster) -> None:
    autoscaler = cluster.autoscaler
    cluster.deploy("one")
    cluster.serve.targets = {"one": 1}
    cluster.report_waiting(one=0)  # there is an ingress
    cluster.report("one", "ready")
    await cluster.tick()
    old = autoscaler.table
    assert len(old.models["one"].replicas) == 1
    waiting = asyncio.create_task(autoscaler.wait_until_unrouted(cluster.report("one", "draining")))
    polls = [asyncio.create_task(autoscaler.watch(old.epoch, old.number, 1))]
    await asyncio.sleep(0.01)
    await cluster.tick()
    new = await polls[0]
    assert not new.models["one"].replicas and not waiting.done(), "the ingress may not have applied the table yet"
    polls.append(asyncio.create_task(autoscaler.watch(new.epoch, new.number, 1)))  # it asks for the next one
    await asyncio.wait_for(waiting, 0.5)
    polls[1].cancel()


async def test_a_draining_replica_does_not_count_as_placed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_module, "PLACING_S", 0.05)
    for name in ("one", "other"):
        cluster.deploy(name, min_uptime=0)
    cluster.serve.targets["other"] = 1
    cluster.report("other", "ready")
    cluster.report("one", "draining")  # a long stream keeps it for minutes
    cluster.free = 0
    cluster.report_waiting(one=1)
    await cluster.tick()
    before = dict(cluster.serve.targets)  # the draining replica may be gone in a moment
    await asyncio.sleep(0.06)
    await cluster.tick()
    assert before["other"] == 1 and cluster.serve.targets["other"] == 0


async def test_a_stored_model_that_cannot_be_read_is_shown_until_it_is_deployed_again(cluster: Cluster) -> None:
    cluster.autoscaler.unreadable = {"old": "cannot read version 3: ModelSpec: model: Field required"}
    cluster.deploy("one")
    statuses = {status.name: status for status in cluster.autoscaler.statuses()}
    assert statuses["old"].state == "failed" and "cannot read version 3" in statuses["old"].cause
    assert not statuses["one"].cause
    cluster.deploy("old")
    assert [status.cause for status in cluster.autoscaler.statuses()] == ["", ""]


def start_and_die(cluster: Cluster, number: int) -> None:
    """Let a replica become ready, answer a request, and lose its engine."""
    report = factories.report("ready", f"r{number}", model="one", in_flight=1)
    cluster.registry.report(report, time.monotonic())
    cluster.autoscaler.replica_ready(report)
    cluster.autoscaler.engine_died(report, "the engine died: CUDA error")
    cluster.registry.remove(report.id)


async def test_an_engine_that_dies_soon_after_each_start_backs_off_and_is_refused(cluster: Cluster) -> None:
    cluster.deploy("one")
    await cluster.tick()
    cluster.serve.targets["one"] = 1
    start_and_die(cluster, 1)
    await cluster.tick()
    assert cluster.serve.targets["one"] == 0, "Serve would restart it at once"
    assert cluster.autoscaler.table.models["one"].failures == 1
    for number in (2, 3):
        start_and_die(cluster, number)
    await cluster.tick()
    route = cluster.autoscaler.table.models["one"]
    assert (route.failures, route.paused, route.cause) == (3, True, "the engine died: CUDA error")
    with pytest.raises(Refused, match="CUDA error"):
        cluster.autoscaler.warm("one")


async def test_a_stable_replica_clears_earlier_failures(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.deploy("one")
    start_and_die(cluster, 1)
    stopped = factories.report("ready", "clean", model="one", in_flight=1)
    cluster.registry.report(stopped, time.monotonic())
    cluster.autoscaler.replica_ready(stopped)
    cluster.autoscaler.replica_stopped(stopped)  # it served, and went to zero
    cluster.registry.remove("clean")
    start_and_die(cluster, 2)
    await cluster.tick()
    assert cluster.autoscaler.table.models["one"].failures == 1
    monkeypatch.setattr(autoscaler_module, "STABLE_S", 0)
    cluster.serve.targets["one"] = 1
    start_and_die(cluster, 3)  # it ran for long: Serve replaces it at once
    await cluster.tick()
    assert cluster.autoscaler.table.models["one"].failures == 0 and cluster.serve.targets["one"] == 1


async def test_a_new_version_is_in_the_routing_table_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler_module, "MIN_TICK_S", 30)
    running = asyncio.create_task(cluster.autoscaler.run())
    try:
        for name in ("one", "two"):
            cluster.deploy(name)
            async with asyncio.timeout(5):
                while name not in cluster.autoscaler.table.models:
                    await asyncio.sleep(0.005)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
