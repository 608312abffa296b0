"""Which node agents control asks about weights, and for how long."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import ray

from llmrun.weights import Weights
from llmrun_runtime.control.catalog import node_agents
from llmrun_runtime.control.catalog import weights as catalog
from llmrun_runtime.control.catalog.node_agents import reachable
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.state.models import Models
from llmrun_runtime.node.agent import NoAgent, agent_of
from llmrun_runtime.placement import Node
from llmrun_runtime.weights.fetch import Peer
from tests.support.factories import CPU

NODES = [Node(name, name, {"CPU": 1}, {"CPU": 1}) for name in "abcd"]
PEER = Peer(url="http://b", token="t")


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
        self.list_adapters = Method([], delay)


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
    assert await weights.list_adapters(Weights("org/adapters"), {}, CPU, None) == []
    assert await weights.elsewhere("pin", "a") == ([], [])
    assert [node.id for node in await reachable(NODES, start=False)] == ["c"]
    with pytest.raises(AssertionError, match="an agent was started"):
        await weights.list_adapters(Weights("org/adapters"), {}, CPU, None, start_agents=True)


def test_a_node_without_an_agent_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(name: str, namespace: str) -> Any:
        raise ValueError(name, namespace)

    monkeypatch.setattr(ray, "get_actor", get_actor)
    with pytest.raises(NoAgent, match="no agent runs on node a"):
        agent_of("a")
