"""Kills one process after the other, as a crash would: SIGKILL, without a warning."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.soak.ledger import Kill, Ledger
from tests.support.cluster import Home, end_node, family, fork_servers, start_node, titled, until

NODE = "127.0.0.11"
FIND_S = 30.0
# The fault that ends everything comes once; the others take turns.
TURNS = (
    "engine core",
    "API server",
    "replica",
    "node agent",
    "fork server",
    "control",
    "Serve's controller",
    "ingress",
    "node",
)


class Faults:
    """The faults of one run on a cluster with a second node."""

    def __init__(self, cluster: Home, node_home: Path, models: list[str], ledger: Ledger, dice: random.Random) -> None:
        self._cluster, self._node_home, self._models = cluster, node_home, models
        self._ledger, self._dice = ledger, dice
        self._node = self._start_node()

    def close(self) -> None:
        """End the second node."""
        end_node(self._node)

    def order(self, count: int) -> list[str]:
        """Return `count` faults: all kinds in turn, shuffled in each turn, the whole cluster's in the middle."""
        order: list[str] = []
        while len(order) < count - 1:
            order += self._dice.sample(TURNS, len(TURNS))
        order = order[: max(count - 1, 0)]
        order.insert(len(order) // 2, "cluster")
        return order

    def inflict(self, what: str) -> None:
        """Kill what the fault names, and bring back what nothing else brings back. Blocks."""
        finders: dict[str, Callable[[], list[tuple[psutil.Process, str]]]] = {
            "engine core": self._engine_cores,
            "API server": self._api_servers,
            "replica": self._replicas,
            "node agent": lambda: [(process, "") for process in titled(self._cluster, "ray::NodeAgent")],
            "fork server": lambda: [(process, "") for process in fork_servers(self._cluster)],
            "control": lambda: [(process, "") for process in titled(self._cluster, "ray::Control")],
            "Serve's controller": lambda: [(p, "") for p in titled(self._cluster, "ray::ServeController")],
            "ingress": lambda: [(process, "") for process in titled(self._cluster, "ray::IngressActor")],
        }
        if what == "node":
            self._kill_node()
        elif what == "cluster":
            self._kill_cluster()
        else:
            process, model = self._dice.choice(until(finders[what], FIND_S, f"{what} is running"))
            self._ledger.kills.append(Kill(what, time.monotonic(), model))
            _kill([process])

    def _start_node(self) -> subprocess.Popen[bytes]:
        return start_node(self._cluster, self._node_home, NODE, resources={})

    def _kill_node(self) -> None:
        self._ledger.kills.append(Kill("node", time.monotonic()))
        raylets = [child for child in psutil.Process(self._node.pid).children() if child.name() == "raylet"]
        _kill(raylets)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._node.wait(10)  # `ray start --block` ends with its raylet
        end_node(self._node)
        self._node = self._start_node()

    def _kill_cluster(self) -> None:
        self._ledger.kills.append(Kill("cluster", time.monotonic()))
        _kill(family(self._cluster))
        node = psutil.Process(self._node.pid)
        _kill([node, *node.children(recursive=True)])
        self._node.wait(10)
        self._cluster.ok("up", "--node-ip", "127.0.0.10", "--port", str(self._cluster.port))
        self._node = self._start_node()

    def _engine_cores(self) -> list[tuple[psutil.Process, str]]:
        return [
            (child, model)
            for engine, model in self._api_servers()
            for child in engine.children()
            if child.name().startswith("VLLM::Engine")
        ]

    def _api_servers(self) -> list[tuple[psutil.Process, str]]:
        return [(process, model) for model in self._models for process in self._cluster.engines(model)]

    def _replicas(self) -> list[tuple[psutil.Process, str]]:
        return [
            (process, model)
            for model in self._models
            for process in titled(self._cluster, f"ray::ServeReplica:llmrun-{model}-v")
        ]


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
