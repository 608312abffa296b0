"""Placement of engines on nodes and devices: several raylets with fake GPUs, and a stub engine that reports both."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.cluster import Home, alive, another_node, free_port, until, write_app
from tests.support.stub_engine import install, stubs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
A10G, H100S = "127.0.0.6", ("127.0.0.7", "127.0.0.8")


@dataclass
class StubHome(Home):
    """A home whose models run on the stub engine."""

    nodes: dict[str, Path] = field(default_factory=dict)
    """The homes of the nodes, by address."""

    def places(self, model: str) -> list[dict[str, Any]]:
        """Send a request; return the places of the engine's members."""
        answer = self.ask(model, timeout=60)
        assert answer.status_code == 200, answer.text
        places: list[dict[str, Any]] = answer.json()["places"]
        return places


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubHome]:
    """A cluster with a head without GPUs, one node with two A10Gs, and two nodes with two H100s each."""
    # The fork server would import vLLM.
    more_env = install(tmp_path_factory.mktemp("packages")) | {"LLMRUN_FORKSERVER": "0", "LLMRUN_TRUSTED_NETWORK": "1"}
    home = StubHome(tmp_path_factory.mktemp("stub"), free_port(), more_env)
    home.ok("up", "--node-ip", "127.0.0.5")
    try:
        with contextlib.ExitStack() as nodes:
            # One after the other: raylets on one machine conflict if they start at the same time.
            for address, kind in [(A10G, "A10G"), *((host, "H100") for host in H100S)]:
                place = tmp_path_factory.mktemp(f"node-{address[-1]}")
                home.nodes[address] = place
                nodes.enter_context(another_node(home, place, address, kind, 2))
                joined = functools.partial(
                    inventory, home, place, H100S.index(address) + 1 if kind == "H100" else 1, kind
                )
                until(joined, 60, f"{address} has joined")
            yield home
            assert stubs() == []
    finally:
        home.ok("down")


def inventory(home: Home, folder: Path, count: int, kind: str) -> bool:
    """Whether the error of a deploy that fits no node lists `count` nodes with GPUs of this kind."""
    text = f'@llm({str(folder)!r}, engine="stub", accelerator="none")\nclass Nobody: ...\n'
    error = home.run("deploy", write_app(folder / "app.py", text), "--dry-run").stderr
    return error.count(f"2 × {kind}") == count


@contextlib.contextmanager
def deployed(stub: StubHome, folder: Path, arguments: str) -> Iterator[list[dict[str, Any]]]:
    """Deploy a model with these arguments; yield the places of its members and delete it at the end."""
    text = f'@llm({str(folder)!r}, name="one", engine="stub", cpus=0.1, {arguments})\nclass One: ...\n'
    stub.ok("deploy", write_app(folder / "app.py", text))
    try:
        yield stub.places("one")
    finally:
        stub.ok("delete", "one", "--yes")
        until(lambda: not stubs(), 30, "no member is left")


@pytest.mark.parametrize(
    ("arguments", "hosts", "devices"),
    [
        ('accelerator="cpu"', ["127.0.0.5", A10G, *H100S], 0),
        ('accelerator="A10G"', [A10G], 1),
        ('accelerator="A10G:2"', [A10G], 2),
        ('accelerator=["L40S", "H100", "A10G"]', H100S, 1),
        ('accelerator="H100", engine_args={"pipeline_parallel_size": 2}', H100S, 2),
        ('accelerator="H100", gpus=2, engine_args="--data-parallel-size 2"', H100S, 2),
    ],
)
def test_an_engine_runs_on_one_node_with_its_devices(
    stub: StubHome, tmp_path: Path, arguments: str, hosts: list[str], devices: int
) -> None:
    with deployed(stub, tmp_path, arguments) as places:
        (place,) = places
        assert place["host"] in hosts and len(place["devices"]) == devices


def test_two_engines_share_a_gpu(stub: StubHome, tmp_path: Path) -> None:
    text = "".join(
        f'@llm({str(tmp_path)!r}, engine="stub", cpus=0.1, accelerator="A10G", gpus=0.5, max_replicas=2)\n'
        f"class {name}: ...\n\n"
        for name in ("Left", "Right")
    )
    stub.ok("deploy", write_app(tmp_path / "app.py", text))
    (left,), (right,) = stub.places("left"), stub.places("right")
    assert left["devices"] == right["devices"] and len(left["devices"]) == 1
    assert left["share"] == right["share"] == 0.5
    assert stub.status("left")["placement"] == "0.5 × A10G"
    for model in ("left", "right"):
        stub.ok("delete", model, "--yes")


def test_a_multi_node_engine_starts_and_stops_as_a_unit(stub: StubHome, tmp_path: Path) -> None:
    with deployed(stub, tmp_path, 'accelerator="H100", gpus=4, nodes=2') as places:
        assert {place["host"] for place in places} == set(H100S)
        assert [place["rank"] for place in places] == [0, 1]
        assert [len(place["devices"]) for place in places] == [2, 2]
        assert stub.status("one")["placement"] == "2 nodes × 2 × H100"
        log = stub.ok("logs", "one")
        assert "member 1 of one v" in log and "engine ready after" in log

        before = stubs()
        assert len(before) == 2
        psutil.Process(places[1]["pid"]).kill()
        until(lambda: "the engine died: its member on node" in stub.status("one")["cause"], 20, "status shows why")
        until(lambda: not any(map(alive, before)), 20, "all members have exited with the killed one")
        again = stub.places("one")
        assert {place["host"] for place in again} == set(H100S) and {p["pid"] for p in again}.isdisjoint(
            p["pid"] for p in places
        )

        before = stubs()
        (replica,) = [process for process in psutil.process_iter(["cmdline"]) if is_replica(process)]
        replica.kill()
        until(lambda: not any(map(alive, before)), 20, "all members have exited with the replica")
        assert len(stub.places("one")) == 2


def test_a_node_on_which_starts_fail_is_set_aside(stub: StubHome, tmp_path: Path) -> None:
    app = write_app(
        tmp_path / "picky" / "app.py",
        f"""
from pathlib import Path

@llm({str(tmp_path)!r}, engine="stub", cpus=0.1, accelerator="H100", idle_timeout=600)
class Picky:
    def on_start(self):
        if any((folder / "broken").exists() for folder in Path(__file__).parents):  # the node's home is among them
            raise RuntimeError("this GPU fell off the bus")
""",
    )
    stub.ok("deploy", app)
    (place,) = stub.places("picky")
    bad = place["host"]
    (stub.nodes[bad] / "broken").touch()

    def is_set_aside() -> bool:
        stub.unload("picky")
        stub.ask("picky", timeout=60)  # it fails if Ray chooses the bad node, which it may do twice
        return f"node {bad} is set aside" in stub.status("picky")["cause"]

    try:
        until(is_set_aside, 90, "the node is set aside")
        for _ in range(3):
            (place,) = until(
                lambda: stub.ask("picky", timeout=60).status_code == 200 and stub.places("picky"), 30, "ok"
            )
            assert place["host"] in set(H100S) - {bad}
            stub.unload("picky")
        assert "2 failed starts: Picky.on_start raised RuntimeError: this GPU fell off" in stub.ok("status", "picky")
    finally:
        (stub.nodes[bad] / "broken").unlink()
        stub.ok("delete", "picky", "--yes")


def test_a_deploy_that_fits_no_set_of_nodes_fails(stub: StubHome, tmp_path: Path) -> None:
    def refused(arguments: str) -> str:
        text = f'@llm({str(tmp_path)!r}, name="one", engine="stub", cpus=0.1, {arguments})\nclass One: ...\n'
        return stub.fails("deploy", write_app(tmp_path / "app.py", text))

    assert "nodes=3: no node has 3 nodes × 2 × H100" in refused('accelerator="H100", gpus=6, nodes=3')
    assert "accelerator='H100:3': no node has 3 × H100" in refused('accelerator="H100:3"')
    assert "every node needs the same number of GPUs" in refused('accelerator="H100", gpus=3, nodes=2')


def is_replica(process: psutil.Process) -> bool:
    """Whether the process is a replica of the model `one`."""
    return "ServeReplica:llmrun-one" in " ".join(process.info["cmdline"] or ())
