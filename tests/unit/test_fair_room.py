"""More models than places, on a simulated cluster: each gets its turn, and models seldom change places."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.placement import Node
from llmrun_runtime.wire.reports import PRIORITIES, Traffic
from tests.support import factories

STEP_S, START_S = 0.5, 10.0


@dataclass
class Model:
    """A model's requests and its only replica. Times are those of the simulation."""

    waiting: deque[float] = field(default_factory=deque)
    """When each request began to wait."""
    ends: list[float] = field(default_factory=list)
    """When each request in flight ends."""
    used: float = 0
    """When the last request was in flight."""
    recent: bool = False
    priority: str = "normal"
    replica: str = ""
    ready_at: float = 0
    draining: bool = False
    wakes: int = 0
    waits: list[float] = field(default_factory=list)
    """Seconds that each request waited."""


class Simulation:
    """One node with `places` places, an autoscaler, and a Serve that needs START_S for a replica."""

    def __init__(self, folder: Path, places: int, **models: dict[str, Any]) -> None:
        self.now = self.start = time.monotonic()
        self.places = places
        self.models = {name: Model() for name in models}
        self.targets: dict[str, int] = {}
        self.registry, rows = Registry(), Models()
        serve: Any = self
        database = Database(f"sqlite:///{folder}/control.db")
        self.autoscaler = Autoscaler(
            models=rows,
            serve_apps=serve,
            registry=self.registry,
            cold_starts=ColdStarts(database, CollectorRegistry()),
            keys=Keys(database),
            nodes=self.nodes,
            head=lambda: "n",
            control=("127.0.0.1", 1),
        )
        for name, options in models.items():
            self.autoscaler.activate(factories.deployed(factories.spec(name, **options)))

    def nodes(self) -> list[Node]:
        """Return the node."""
        used = sum(bool(model.replica) for model in self.models.values())
        return [Node("n", "n", {"CPU": self.places}, {"CPU": self.places - used})]

    def target(self, model: str, version: int) -> int:
        """Return the last target."""
        return self.targets.get(model, 0)

    def is_confirmed(self, model: str, version: int) -> bool:
        """Confirm every target."""
        return True

    async def set_target(self, row: Deployed, replicas: int, avoid: frozenset[str] = frozenset()) -> None:
        """Set a target."""
        self.targets[row.name] = replicas

    def ask(self, name: str) -> None:
        """Send a request; it waits until the replica is ready."""
        self.models[name].waiting.append(self.now)

    async def step(self, seconds: float) -> None:
        """Let STEP_S pass; new requests run for `seconds`."""
        self.now += STEP_S
        for name, model in self.models.items():
            model.used = min(self.now, max(model.ends, default=model.used))
            model.ends = [end for end in model.ends if end > self.now]
            if model.replica and not self.targets.get(name) and not model.draining:
                model.draining = True
            if model.draining and not model.ends:
                self.registry.remove(model.replica)
                model.replica, model.draining = "", False
            free = self.nodes()[0].available["CPU"] > 0
            if self.targets.get(name) and not model.replica and free:
                model.wakes += 1
                model.replica, model.ready_at = f"{name}-{model.wakes}", self.now + START_S
            ready = model.replica and not model.draining and self.now >= model.ready_at
            while ready and model.waiting:
                model.waits.append(self.now - model.waiting.popleft())
                model.ends.append(self.now + seconds)
            if model.replica:
                state = "draining" if model.draining else "ready" if ready else "starting"
                counts = {"in_flight": len(model.ends), "idle_s": self.now - model.used}
                report = factories.report(state, model.replica, model=name, **counts)
                if self.registry.report(report, self.now) and state == "ready":
                    self.autoscaler.replica_ready(report)
        self.registry.report_traffic("ingress", {name: self._traffic(m) for name, m in self.models.items()}, self.now)
        await self.autoscaler.tick(self.now)
        await asyncio.sleep(0)

    def _traffic(self, model: Model) -> Traffic:
        priority = PRIORITIES.index(model.priority)
        since = model.waiting[0] if model.waiting else 0
        return Traffic(len(model.waiting), len(model.ends), since, priority, priority, model.recent)

    def cause(self, name: str) -> str:
        """Return a model's cause."""
        return next(row.cause for row in self.autoscaler.statuses() if row.name == name)

    async def run(self, seconds: float, asked: dict[str, float], random_numbers: random.Random) -> int:
        """Ask each model at random, on average every `asked` seconds. Return how often the asked model changed."""
        changes, last = 0, ""
        until = self.now + seconds
        while self.now < until:
            for name, every in asked.items():
                if random_numbers.random() < STEP_S / every:
                    self.ask(name)
                    changes, last = changes + (name != last), name
            await self.step(random_numbers.uniform(1, 10))
        return changes


@pytest.mark.parametrize("seed", range(3))
async def test_three_models_that_are_always_asked_share_two_places(tmp_path: Path, seed: int) -> None:
    simulation = Simulation(tmp_path, 2, a={}, b={}, c={})
    seconds = 1800
    changes = await simulation.run(seconds, dict.fromkeys("abc", 2.0), random.Random(seed))
    wakes = sum(model.wakes for model in simulation.models.values())
    longest = max(wait for model in simulation.models.values() for wait in model.waits)
    assert changes > 1000
    # Each stays for START_S and min_uptime (60 s) at least.
    assert wakes <= 2 * (seconds / (START_S + 60) + 1), f"{wakes} wakes, {changes} changes, {longest:.0f} s"
    assert longest <= 130, f"{wakes} wakes, {changes} changes, {longest:.0f} s"


async def test_models_that_fit_never_yield(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 2, a={}, b={})
    await simulation.run(600, dict.fromkeys("ab", 2.0), random.Random(1))
    assert [model.wakes for model in simulation.models.values()] == [1, 1]


async def test_a_busy_model_gives_way_after_max_wait_for_room(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 1, a={"min_uptime": 5}, b={"max_wait_for_room": 20})
    numbers = random.Random(1)
    await simulation.run(40, {"a": 1.0}, numbers)
    simulation.ask("b")
    asked = simulation.now
    while not simulation.models["b"].replica:
        await simulation.run(STEP_S, {"a": 1.0}, numbers)
        assert simulation.now - asked < 40
        if simulation.models["a"].draining:
            assert simulation.now - asked >= 20
            assert simulation.cause("a") == "giving way to b after 20 s"
            assert simulation.cause("b") == "waiting for its turn: a yields"
            assert not simulation.autoscaler.table.models["a"].replicas, "its new requests wait in the ingress"
    await simulation.run(START_S + 1, {"a": 1.0}, numbers)
    assert simulation.models["b"].waits and simulation.targets["a"] == 1


@pytest.mark.parametrize("options", [{"evictable": False}, {"min_replicas": 1}, {"min_uptime": 1000}])
async def test_protected_replicas_never_give_way(tmp_path: Path, options: dict[str, Any]) -> None:
    simulation = Simulation(tmp_path, 1, a=options, b={})
    await simulation.run(20, {"a": 1.0}, random.Random(1))
    simulation.ask("b")
    await simulation.run(200, {"a": 1.0}, random.Random(1))
    assert simulation.models["a"].wakes == 1 and not simulation.models["b"].wakes


async def test_a_start_that_nobody_waits_for_gives_way_at_once(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 1, a={}, b={})
    simulation.ask("a")
    await simulation.run(3, {}, random.Random(1))
    assert simulation.models["a"].replica
    simulation.models["a"].waiting.clear()  # its only caller leaves
    simulation.ask("b")
    await simulation.run(START_S + 5, {}, random.Random(1))
    (waited,) = simulation.models["b"].waits
    assert waited < START_S + 5 and simulation.models["a"].wakes == 1


async def test_batch_gives_way_at_once_and_takes_no_turn_from_others(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 1, a={}, b={})
    simulation.models["b"].priority = "batch"
    numbers = random.Random(1)
    await simulation.run(100, {"a": 1.0, "b": 5.0}, numbers)
    assert not simulation.models["b"].wakes, "batch never makes normal requests yield"
    await simulation.run(400, {"b": 1.0}, numbers)  # `a` is idle
    assert simulation.models["b"].replica
    asked = simulation.now
    simulation.ask("a")
    while len(simulation.models["b"].ends) and simulation.now - asked < 60:
        await simulation.run(STEP_S, {"b": 1.0}, numbers)
    assert simulation.now - asked < 15


async def test_a_high_priority_gets_the_next_place(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 1, a={}, b={}, c={})
    simulation.models["c"].priority = "high"
    numbers = random.Random(1)
    await simulation.run(75, {"a": 1.0}, numbers)
    simulation.ask("b")
    await simulation.run(10, {"a": 1.0}, numbers)
    simulation.ask("c")
    assert simulation.models["a"].replica
    while not (simulation.models["b"].waits or simulation.models["c"].waits):
        await simulation.run(STEP_S, {}, numbers)  # `a` becomes idle
        assert simulation.now - simulation.start < 200
    assert simulation.models["c"].waits and not simulation.models["b"].wakes
    await simulation.run(200, {}, numbers)
    assert simulation.models["b"].waits, "it gets the place after that"


async def test_a_model_between_two_requests_of_one_caller_is_not_idle(tmp_path: Path) -> None:
    """Its requests are shorter than the time between two counts: each count may find none of them."""
    simulation = Simulation(tmp_path, 1, a={"min_uptime": 5}, b={"max_wait_for_room": 20})
    await simulation.run(40, {"a": 1.0}, random.Random(1))
    await simulation.run(20, {}, random.Random(1))
    simulation.ask("b")
    asked = simulation.now
    simulation.models["a"].recent = True
    while simulation.models["a"].replica and simulation.now - asked < 60:
        await simulation.step(1)
    assert 20 <= simulation.now - asked < 25
