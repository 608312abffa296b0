"""Plans, placement, evictions, models, the registry and the database of control, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrun.errors import Refused
from llmrun.spec import ModelSpec
from llmrun.weights import Weights
from llmrun.wire import DeployRequest, Plan
from llmrun_runtime.control.autoscaling import warm_nodes
from llmrun_runtime.control.autoscaling.model_state import ModelState
from llmrun_runtime.control.autoscaling.model_view import ModelView
from llmrun_runtime.control.autoscaling.policy import Failure
from llmrun_runtime.control.autoscaling.serve_config import app_name, parse_app_name
from llmrun_runtime.control.operations.plan import check, make_plan
from llmrun_runtime.control.state import database as database_module
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Candidate, Deployed, Models
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.placement import Node, Placement, has_capacity, resolve, shortage
from llmrun_runtime.weights.pin import File, Pin
from llmrun_runtime.wire.reports import LEASE_S, Traffic
from tests.support.factories import CPU, deployed, report, spec

LAPTOP = Node("a", "10.0.0.1", {"CPU": 2}, {"CPU": 1})
POOL = Node("", "pool", {"CPU": 8, "GPU": 8, "accelerator_type:H100": 1}, {})
A10G = Node(
    "b", "10.0.0.2", {"CPU": 8, "GPU": 2, "accelerator_type:A10G": 1}, {"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}
)


def plan(
    *specs: ModelSpec, rows: tuple[Deployed, ...] = (), sources: dict[str, str] | None = None, **options: Any
) -> Plan:
    """Return the plan of a deploy of app `app` from source `/apps/app.py`."""
    request = DeployRequest(app="app", source="/apps/app.py", specs=specs, **options)
    before = {row.name: row for row in rows}
    check(request, before, sources or {})
    return make_plan(request, before, {model.name: deployed(model) for model in specs})


async def test_a_slow_listener_receives_all_events_of_an_operation() -> None:
    operation, received = Operation(), []
    await operation.emit("step", text="1")
    async for event in operation.events():
        received.append(event.text or event.kind)
        if event.text == "1":
            for complete in (1, 2):
                await operation.emit("progress", text="moving", here=complete, total=2)
            await operation.emit("step", text="2")
            await operation.emit("end")
    assert received == ["1", "moving", "2", "end"]


def test_a_plan_has_the_kind_of_change_of_each_model() -> None:
    rows = (
        deployed(spec("a")),
        deployed(spec("b")),
        deployed(spec("c")),
        deployed(spec("d")),
        deployed(spec("x"), "other"),
    )
    planned = plan(spec("a"), spec("b", max_replicas=2), spec("c", cpus=2), spec("e"), rows=rows)
    assert [(c.model, c.kind, c.lines) for c in planned.changes] == [
        ("a", "same", ()),
        ("b", "tune", ("max_replicas 1 → 2",)),
        ("c", "change", ("cpus None → 2",)),
        ("e", "add", ("org/model",)),
        ("d", "remove", ()),
    ]
    assert (
        planned.fingerprint
        == plan(spec("a"), spec("b", max_replicas=2), spec("c", cpus=2), spec("e"), rows=rows).fingerprint
    )
    assert planned.fingerprint != plan(spec("a"), rows=rows).fingerprint


def test_deploying_some_models_of_an_app_keeps_the_others() -> None:
    planned = plan(spec("a", cpus=2), rows=(deployed(spec("a")), deployed(spec("b"))), only=True)
    assert [(c.model, c.kind) for c in planned.changes] == [("a", "change")]


def test_another_placement_needs_a_new_engine() -> None:
    planned = plan(spec("a"), rows=(deployed(spec("a"), placement=Placement(1, 1)),))
    assert planned.changes[0].kind == "change" and planned.changes[0].lines == ("runs on 1 × GPU → CPU",)


class Agents:
    """Fake node agents that record calls."""

    def __init__(self) -> None:
        self.warmed: list[tuple[str, str]] = []
        self.stopped: list[str] = []

    def on(self, node: str) -> Any:
        """Return a handle."""
        remote = SimpleNamespace(remote=lambda engine: self.warmed.append((node, engine)))
        return SimpleNamespace(warm=remote)


def test_fixed_nodes_are_warmed_and_idle_removable_nodes_released(monkeypatch: pytest.MonkeyPatch) -> None:
    agents, registry = Agents(), Registry()
    monkeypatch.setattr(warm_nodes, "agent_on", agents.on)
    monkeypatch.setattr(warm_nodes, "stop_agent", agents.stopped.append)
    models = Models()
    models.put(deployed(spec("a")))
    check_nodes = warm_nodes.WarmNodes(models, registry, Operations(), 60, list, lambda: "head").check
    head, other = (Node(name, name, {"CPU": 4}, {"CPU": 4}) for name in ("head", "other"))
    check_nodes([head, other], 0)
    assert agents.warmed == [("head", "vllm"), ("other", "vllm")] and not agents.stopped
    agents.warmed.clear()
    group = Node("", "group", {"CPU": 4}, {})
    check_nodes([head, other, group], 0)
    check_nodes([head, other, group], 59)
    assert agents.warmed == [("head", "vllm")] * 2 and not agents.stopped
    registry.report(report(replica="r", model="a", node="other"), 59)
    check_nodes([head, other, group], 61)
    registry.remove("r")
    check_nodes([head, other, group], 120)
    assert not agents.stopped
    check_nodes([head, other, group], 121)
    assert agents.stopped == ["other"]
    models.remove("a")
    agents.warmed.clear()
    check_nodes([head, other], 200)
    assert not agents.warmed


def test_a_models_state_follows_its_replicas_and_target() -> None:
    row, state, registry = deployed(spec("a")), ModelState(), Registry()
    assert ModelView(row, state, registry, 0, locked=False).state() == "cold"
    waking = ModelView(row, state, registry, 1, locked=False)
    assert (waking.state(), waking.phase()) == ("waking", "placing a replica")
    replica = report("starting", "r", model="a", moments={"placed": 1})
    for part, phase in (
        ("placed", "fetching weights"),
        ("weights", "starting the engine"),
        ("forked", "loading weights"),
    ):
        replica = replace(replica, moments={**replica.moments, part: 1})
        registry.report(replica, 0)
        assert waking.phase() == phase
    registry.report(replace(replica, state="ready"), 0)
    assert (waking.state(), waking.phase()) == ("hot", "")
    registry.report(replace(replica, state="draining"), 0)
    assert ModelView(row, state, registry, 0, locked=False).state() == "draining"
    registry.remove("r")
    state.evicted = "evicted to free resources for b"
    assert ModelView(row, state, registry, 0, locked=False).cause() == state.evicted
    state.failure = Failure(1, "no such dtype", 0)
    failed = ModelView(row, state, registry, 0, locked=False)
    assert (failed.state(), failed.cause(), failed.route(1, 2.5).failures) == ("failed", "no such dtype", 1)


def test_models_are_resolved_by_name_and_alias() -> None:
    models = Models()
    models.put(deployed(spec("a", aliases=["org/a"])))
    models.candidates["b"] = Candidate(deployed(spec("b")), "out of memory")
    assert (models.resolve("org/a"), models.resolve("b")) == ("a", "b")
    assert models.resolve_unlocked("org/a") == models.get("a")
    with pytest.raises(Refused, match="model 'c' not found; available: a, b"):
        models.resolve("c")
    with pytest.raises(Refused, match="b has no active version"):
        models.resolve_unlocked("b")
    models.lock("a")
    with pytest.raises(Refused, match="a is locked by a running deploy"):
        models.resolve_unlocked("a")
    models.unlock("a")
    models.put(deployed(spec("b")))
    assert models.resolve_unlocked("b").name == "b" and not models.candidates


def test_secrets_are_shown_by_name() -> None:
    planned = plan(spec("a", env={"K": {"secret": "MINE"}}), rows=(deployed(spec("a")),))
    assert planned.changes[0].lines == ("env {} → {K: Secret('MINE')}",)


@pytest.mark.parametrize("field", ["name", "aliases"])
def test_names_are_unique_on_a_cluster(field: str) -> None:
    other = deployed(spec("one", aliases=["org/one"]), app="other")
    mine = spec("one") if field == "name" else spec("two", aliases=["org/one"])
    with pytest.raises(Refused, match="belongs to model one of app other"):
        plan(mine, rows=(other,))
    with pytest.raises(Refused, match="belongs to model a"):
        plan(spec("a"), spec("b", aliases=["a"]))


def test_a_name_may_move_between_an_apps_own_models() -> None:
    rows = (deployed(spec("a", aliases=["org/m"])), deployed(spec("b")))
    planned = plan(spec("a"), spec("b", aliases=["org/m"]), rows=rows)
    assert [c.kind for c in planned.changes] == ["change", "change"]


def test_a_renamed_model_may_take_the_names_of_a_pruned_one() -> None:
    rows = (deployed(spec("a", aliases=["org/m"])),)
    with pytest.raises(Refused, match=r"belongs to model a, which is no longer in the file \(--prune removes it\)"):
        plan(spec("b", aliases=["org/m"]), rows=rows)
    planned = plan(spec("b", aliases=["org/m"]), rows=rows, prune=True)
    assert [(c.model, c.kind) for c in planned.changes] == [("b", "add"), ("a", "remove")]


def test_an_app_from_another_source_is_refused_without_adopt() -> None:
    with pytest.raises(Refused, match=r"last deployed from /other/app.py, not from /apps/app.py.*--adopt"):
        plan(spec("a"), sources={"app": "/other/app.py"})
    assert plan(spec("a"), sources={"app": "/other/app.py"}, adopt=True).changes[0].kind == "add"


@pytest.mark.parametrize(
    ("fields", "nodes", "placement"),
    [
        ({}, [LAPTOP], Placement(1, 0)),
        ({}, [LAPTOP, A10G], Placement(1, 1)),
        ({"accelerator": "cpu"}, [LAPTOP, A10G], Placement(1, 0)),
        ({"gpus": 0}, [LAPTOP, A10G], Placement(1, 0)),
        ({"gpus": 2}, [LAPTOP, A10G], Placement(1, 2)),
        ({"accelerator": "A10G:2"}, [LAPTOP, A10G], Placement(1, 2, "A10G")),
        ({"accelerator": ["H100", "A10G"]}, [LAPTOP, A10G], Placement(1, 1, "A10G")),
        (
            {"accelerator": "H100"},
            [LAPTOP, POOL],
            Placement(1, 1, "H100"),
        ),
        ({"gpus": 0.5}, [LAPTOP, A10G], Placement(1, 0.5)),
        ({"accelerator": "A10G", "gpus": 4, "nodes": 2}, [A10G, A10G], Placement(1, 2, "A10G", 2)),
        ({"engine_args": "-tp 2 -pp 1"}, [LAPTOP, A10G], Placement(1, 2)),
        ({"accelerator": ["A10G", "H100"], "gpus": 16, "nodes": 2}, [A10G, POOL], Placement(1, 8, "H100", 2)),
    ],
)
def test_placements(fields: dict[str, Any], nodes: list[Node], placement: Placement) -> None:
    assert resolve(spec(**fields), nodes) == placement


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"accelerator": "H100"}, ["accelerator='H100'", "1 × H100", "2 × A10G, 8 CPUs"]),
        ({"accelerator": ["H100:8", "A100:8"]}, ["8 × H100 or 8 × A100"]),
        ({"gpus": 4}, ["gpus=4", "4 × GPU"]),
        ({"cpus": 64}, ["cpus=64", "64 CPUs"]),
        ({"gpus": 4, "nodes": 2}, ["nodes=2: no node has 2 nodes × 2 × GPU"]),
    ],
)
def test_options_that_no_node_satisfies_are_refused_with_the_inventory(
    fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(Refused) as caught:
        resolve(spec(**fields), [LAPTOP, A10G])
    for word in words:
        assert word in str(caught.value)


def test_capacity_and_its_users() -> None:
    assert has_capacity(CPU, [LAPTOP])
    assert not has_capacity(Placement(2, 0), [LAPTOP])
    assert has_capacity(Placement(2, 0), [LAPTOP], freed={"a": [CPU]})
    assert has_capacity(Placement(3, 0), [LAPTOP], freed={"a": [CPU, CPU]})  # both replicas of the node stop
    text = shortage(Placement(1, 2, "A10G"), [LAPTOP, A10G], ["busy"])
    assert "1 CPUs and 2 × A10G" in text and "1 × A10G, 8 CPUs" in text and "in use by busy" in text


def test_a_replica_that_spans_nodes_needs_capacity_on_each() -> None:
    wide = Placement(1, 2, "A10G", 2)
    full = {"CPU": 8.0, "GPU": 2, "accelerator_type:A10G": 1}
    nodes = [Node(name, name, full, full) for name in "ab"] + [Node("c", "c", full, {"CPU": 8})]
    assert has_capacity(wide, nodes) and not has_capacity(Placement(1, 2, "A10G", 3), nodes)
    assert "1 CPUs and 2 nodes × 2 × A10G each" in shortage(wide, nodes, [])


def test_the_registry_expires_replicas_and_ingresses_without_reports() -> None:
    registry = Registry()
    assert registry.report(report("starting"), now=0)
    assert registry.report(report(), now=1)
    assert not registry.report(report(in_flight=3), now=2)
    registry.report_traffic("ingress", {"one": Traffic(waiting=2, in_flight=5)}, now=2)
    assert (registry.waiting("one"), registry.in_flight("one")) == (2, 5)
    assert registry.expire(2 + LEASE_S) == []
    assert [expired.id for expired in registry.expire(3 + LEASE_S)] == ["r1"]
    assert (registry.waiting("one"), registry.replicas_of("one")) == (0, [])


def test_a_draining_replica_stays_draining() -> None:
    registry = Registry()
    registry.report(report(), now=0)
    assert registry.report(report("draining"), now=1)
    assert not registry.report(report(), now=2)
    assert registry.ready("one", 1) == []


def test_last_use_follows_from_reports() -> None:
    registry = Registry()
    registry.report(report(), now=100)
    registry.report(report(idle_s=30), now=200)
    assert registry.last_used["one"] == 170
    registry.report(report(idle_s=100), now=201)
    assert registry.last_used["one"] == 170


def test_the_database_keeps_models_versions_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'db'}"
    database = Database(url)
    coded = spec("two", code={"package": "p", "file": "app.py", "cls": "Two"})
    database.put_app("app", "/apps/app.py")
    database.put_package("p", b"zip")
    database.put_package("q", b"unused")
    pin = Pin(weights=Weights("org/model"), revision="abc", files=(File(name="config.json", size=2),))
    row = replace(deployed(spec("one")), pin=pin)
    database.put_version(row, active=True)
    database.put_version(deployed(coded), active=True)
    database.put_version(replace(row, version=2, engine_version=2), active=False)
    assert (database.last_version("one"), database.reserve_version("one")) == (2, 3)
    database.close()

    again = Database(url)
    rows, sources = again.load()
    assert rows.keys() == {"one", "two"}
    assert rows["one"] == row and sources == {"app": "/apps/app.py"}
    again.remove(["one"])
    assert again.reserve_version("one") == 4  # old versions may still be draining under their numbers
    assert again.has_package("q")  # a running deploy may have uploaded it
    monkeypatch.setattr(database_module, "PACKAGE_GRACE_S", -1)
    again.remove([])
    assert (again.package("p"), again.package("q")) == (b"zip", None)
    again.remove(["two"])
    assert again.load() == ({}, {}) and not again.has_package("p")
    again.close()


def test_application_names_contain_model_and_version() -> None:
    assert parse_app_name(app_name("my-v2", 3)) == ("my-v2", 3)
    assert parse_app_name("other-app") is None
