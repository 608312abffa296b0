"""Which node agents control asks about weights, and for how long."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray

from llmrun.errors import WeightsError
from llmrun.weights import Weights
from llmrun.wire import Event
from llmrun_runtime.control.catalog import distribution, node_agents
from llmrun_runtime.control.catalog import weights as catalog
from llmrun_runtime.control.catalog.node_agents import reachable
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.operations.weights_nodes import count_weights_nodes, freest_first
from llmrun_runtime.control.state.models import Models
from llmrun_runtime.control.state.operation import Operation
from llmrun_runtime.node.agent import NoAgent, agent_of
from llmrun_runtime.placement import Node, Placement
from llmrun_runtime.weights.adapters import AdapterListing
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.weights.pin import Pin
from tests.support.factories import CPU, spec

NODES = [Node(name, name, {"CPU": 1}, {"CPU": 1}) for name in "abcd"]
PIN = Pin(weights=Weights("org/model"), revision="a" * 40, files=())
ONE_GPU = Placement(1, 1)
ROUND_S = 0.1
PEER = Peer(url="http://b", token="t")
LISTING = AdapterListing(digest="d", adapters=())


class Method:
    """A fake actor's method: replies after `delay` seconds."""

    def __init__(self, reply: Any, delay: float) -> None:
        self._reply, self._delay = reply, delay

    async def remote(self, *_: Any) -> Any:
        """Return the reply."""
        await asyncio.sleep(self._delay)
        return self._reply


class Agent:
    """A fake node agent."""

    def __init__(self, *, has_pin: bool = False, delay: float = 0) -> None:
        self.has_pin = Method(has_pin, delay)
        self.serve_peers = Method(PEER, delay)
        self.list_weights = Method([], delay)
        self.list_adapters = Method(LISTING, delay)


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> dict[str, Agent]:
    """Return the running agents of nodes a to d, by node; the tests start none."""
    running: dict[str, Agent] = {}

    def of(node: str) -> Agent:
        if node not in running:
            raise NoAgent(node)
        return running[node]

    def on(node: str) -> Agent:
        assert node in running, f"an agent was started on {node}"
        return running[node]

    for module in (catalog, node_agents):
        monkeypatch.setattr(module, "agent_of", of)
        monkeypatch.setattr(module, "agent_on", on)
    monkeypatch.setattr(catalog, "real_nodes", lambda: NODES)
    return running


async def test_a_node_that_hangs_delays_no_fetch(agents: dict[str, Agent]) -> None:
    agents |= {"b": Agent(has_pin=True), "c": Agent(has_pin=True, delay=60)}
    started = time.monotonic()
    peers, _ = await WeightsCatalog(Models()).elsewhere("pin", "a")
    assert peers == [PEER]
    assert time.monotonic() - started < 3


async def test_listings_start_no_agents(agents: dict[str, Agent]) -> None:
    agents["c"] = Agent()
    weights = WeightsCatalog(Models())
    assert await weights.rows() == []
    assert await weights.list_adapters(Weights("org/adapters"), {}, CPU, None) == LISTING
    assert await weights.elsewhere("pin", "a") == ([], [])
    assert [node.id for node in await reachable(NODES, start=False)] == ["c"]
    with pytest.raises(AssertionError, match="an agent was started"):
        await weights.list_adapters(Weights("org/adapters"), {}, CPU, None, start_agents=True)


class Downloads:
    """Agents of many nodes that download a pin, each from the first peer that control names, as `NodeAgent.fetch`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, failing: dict[str, str]) -> None:
        self.catalog = WeightsCatalog(Models())
        self.nodes = [Node(f"n{i:02}", f"n{i:02}", {"CPU": 1}, {"CPU": 1}) for i in range(count)]
        self.have: set[str] = set()
        self.sent: Counter[str] = Counter()
        self.feeding: Counter[str] = Counter()
        self.most_at_once = 0
        self.round: Counter[str] = Counter()
        """By node, how many downloads one after the other brought the pin there."""
        self._failing = failing
        agents = {node.id: _Downloader(self, node.id) for node in self.nodes}
        for module in (catalog, node_agents, distribution):
            for name in ("agent_of", "agent_on"):
                monkeypatch.setattr(module, name, agents.__getitem__, raising=False)
        monkeypatch.setattr(catalog, "real_nodes", lambda: self.nodes)

    async def fetch(self, node: str) -> str:
        """Download for ROUND_S from the first peer, or from the store."""
        peers, _ = await self.catalog.elsewhere(PIN.id, node)
        source = peers[0].token if peers else "store"
        self.feeding[source] += 1
        self.most_at_once = max(self.most_at_once, self.feeding[source])
        await asyncio.sleep(ROUND_S)
        self.feeding[source] -= 1
        if node in self._failing:
            raise WeightsError(self._failing[node])
        self.sent[source] += 1
        self.round[node] = self.round[source] + 1
        self.have.add(node)
        return "folder"

    async def run(self, **counts: int) -> list[Event]:
        """Distribute the pin; return the events. Raises WeightsError."""
        operation = Operation()
        try:
            await self.catalog.distribute(PIN, {}, self.nodes, operation, "one", **counts)
        finally:
            await operation.emit("end")
        return [event async for event in operation.events()]


class _Downloader:
    def __init__(self, downloads: Downloads, node: str) -> None:
        async def has_pin(_: str) -> bool:
            return node in downloads.have

        async def serve_peers() -> Peer:
            return Peer(url=f"http://{node}", token=node)

        async def fetch(*_: Any) -> str:
            return await downloads.fetch(node)

        async def progress(_: str) -> tuple[int, int]:
            return 1, 2

        self.has_pin, self.serve_peers = _Remote(has_pin), _Remote(serve_peers)
        self.fetch, self.progress = _Remote(fetch), _Remote(progress)


class _Remote:
    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


async def test_nodes_feed_each_other_in_rounds_that_double(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = Downloads(monkeypatch, 49, {})
    await downloads.run(wanted=49, needed=1)
    assert len(downloads.have) == 49 and downloads.sent["store"] == 1
    assert downloads.most_at_once == 1  # no node ever sends to two others at once
    assert max(downloads.sent.values()) <= 8 and max(downloads.round.values()) <= 8  # log2(49) is 5.6


async def test_weights_go_to_as_many_nodes_as_wanted_and_to_those_that_have_them_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    downloads = Downloads(monkeypatch, 9, {})
    downloads.have = {"n07"}
    await downloads.run(wanted=3, needed=1)
    assert downloads.have == {"n07", "n00", "n01"} and downloads.sent["store"] == 0
    await downloads.run(wanted=3, needed=1)
    assert downloads.have == {"n07", "n00", "n01"}


async def test_a_node_that_fails_is_a_warning_and_another_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = Downloads(monkeypatch, 5, {"n00": "the disk is full", "n02": "no space"})
    events = await downloads.run(wanted=2, needed=1)
    assert downloads.have == {"n01", "n03"}
    warnings = [event.text for event in events if event.kind == "warning"]
    assert warnings[0].startswith("node n00: cannot download the weights: the disk is full")
    assert all(event.model == "one" for event in events if event.kind == "warning")


async def test_a_deploy_without_a_good_node_names_each_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = Downloads(monkeypatch, 3, {"n00": "the disk is full", "n01": "no space", "n02": "no route"})
    message = "org/model is on 0 of 1 nodes: node n00: the disk is full; node n01: no space; node n02: no route"
    with pytest.raises(WeightsError, match=re.escape(message)):
        await downloads.run(wanted=2, needed=1)


async def test_a_cancelled_distribution_starts_no_more_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = Downloads(monkeypatch, 8, {})
    task = asyncio.ensure_future(downloads.run(wanted=8, needed=1))
    await asyncio.sleep(1.5 * ROUND_S)
    task.cancel()
    await asyncio.wait({task})
    await asyncio.sleep(3 * ROUND_S)
    assert len(downloads.have) <= 2 and not downloads.catalog._feeders


async def test_replicas_that_wake_together_use_different_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = Downloads(monkeypatch, 8, {})
    downloads.have = {"n00", "n01", "n02"}
    await asyncio.gather(*(downloads.fetch(f"n0{i}") for i in range(3, 6)))
    await asyncio.gather(*(downloads.fetch(f"n0{i}") for i in range(6, 8)))
    assert len(downloads.sent) >= 4


def test_the_number_of_nodes_with_weights() -> None:
    nodes = [Node(f"n{i}", f"n{i}", {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4 - i}) for i in range(4)]

    def count(placement: Placement = ONE_GPU, **options: Any) -> int:
        return count_weights_nodes(spec(**options), placement, nodes)

    assert count() == 2 and count(max_replicas=4) == 2 and count(max_replicas=9) == 3 and count(max_replicas=99) == 4
    assert count(weights_nodes=1) == 1 and count(weights_nodes=3) == 3 and count(weights_nodes=99) == 4
    assert count(Placement(1, 4, nodes=3), weights_nodes=1) == 3
    assert [node.id for node in freest_first(reversed(nodes))] == ["n0", "n1", "n2", "n3"]


def test_a_node_without_an_agent_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(name: str, namespace: str) -> Any:
        raise ValueError(name, namespace)

    monkeypatch.setattr(ray, "get_actor", get_actor)
    with pytest.raises(NoAgent, match="no agent runs on node a"):
        agent_of("a")
