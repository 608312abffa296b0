"""The weights on all nodes: what source names mean, which nodes have a pin, what must be kept, and distribution.

Calls node agents; transfers no bytes itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ray

from llmrun.errors import EngineError, LLMRunError, WeightsError
from llmrun.spec import ModelSpec, Secret
from llmrun.weights import Weights
from llmrun.wire import WeightsRow
from llmrun_runtime.control.catalog.distribution import PROGRESS_S, TASK_TIMEOUT_S, Distribution, Feeders, emit_progress
from llmrun_runtime.control.catalog.node_agents import (
    CALL_TIMEOUT_S,
    call_all,
    call_each,
    reachable,
    try_each,
)
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.operation import Operation
from llmrun_runtime.node.agent import agent_of, agent_on
from llmrun_runtime.placement import Node, Placement, could_run
from llmrun_runtime.ray_nodes import real_nodes
from llmrun_runtime.weights.adapters import AdapterListing
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.weights.node_weights import PIN_TIMEOUT_S
from llmrun_runtime.weights.pin import Pin

# A replica or a request waits meanwhile. A node that responds later is no peer: the store is used.
HOLDER_TIMEOUT_S = 1.5
KEEP_PINS = 64
T = TypeVar("T")
COMMIT_LENGTH = 40


class WeightsCatalog:
    """Resolve sources to pins, and track and distribute pins across the nodes."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._pins: dict[str, Pin] = {}
        """Recently resolved pins, by source and environment."""
        self._protected: list[str] = []
        self._feeders: Feeders = {}
        self._last_fed: dict[str, int] = {}
        """By node, when it was last chosen to send weights, as a count."""

    async def pin(self, spec: ModelSpec, placement: Placement, old: Deployed | None, *, fresh: bool) -> Pin | None:
        """Resolve a model's weights to a pin; None for a path. Raises LLMRunError.

        Without `fresh`, the result of the last resolution is used, if there is one. Otherwise the first of:

        1. Weights imported under that name.
        2. The deployed pin, if the source names its exact commit: it cannot have changed.
        3. The source's reply, requested by a node that could run the model, with that node's credentials.
        """
        weights = spec.model
        if weights.kind == "path":
            return None
        key = weights.model_dump_json() + spec.model_dump_json(include={"env"})
        if not fresh and key in self._pins:
            return self._pins[key]
        nodes = await reachable(await asyncio.to_thread(real_nodes))
        pin = await self._imported(weights, nodes)
        if pin is None and old and old.pin and _same_commit(old.pin, weights):
            pin = old.pin
        if pin is None:
            resolved: Pin = await _first_reply(
                weights, _able(placement, nodes), lambda node: agent_on(node.id).pin.remote(weights, spec.env)
            )
            pin = resolved
        while len(self._pins) >= KEEP_PINS:
            del self._pins[next(iter(self._pins))]
        self._pins[key] = pin
        return pin

    async def _imported(self, weights: Weights, nodes: Sequence[Node]) -> Pin | None:
        """Return the newest pin that was imported under that name."""
        replies: list[tuple[float, Pin] | None] = await call_each(
            nodes, lambda node: agent_on(node.id).last_import.remote(weights), None
        )
        newest = max((reply for reply in replies if reply), key=lambda reply: reply[0], default=None)
        return newest[1] if newest else None

    async def list_adapters(
        self,
        weights: Weights,
        env: Mapping[str, Secret | str],
        placement: Placement,
        ranks: dict[str, int] | None,
        known: str = "",
        *,
        start_agents: bool = False,
        published: bool = False,
    ) -> AdapterListing:
        """List the adapters at a source now, from a node that could run the model. Raises LLMRunError.

        `ranks`, `known`, `published`: see `NodeWeights.list_adapters`. Without `start_agents`, use a node that has an
        agent, or control's own: an autoscaler keeps a node that has an agent.
        """
        every = await asyncio.to_thread(real_nodes)
        nodes = await reachable(every, start=start_agents)
        if not nodes and not start_agents:
            own = ray.get_runtime_context().get_node_id()
            nodes = [node for node in every if node.id == own]
        return await _first_reply(
            weights,
            _able(placement, nodes),
            lambda node: agent_on(node.id).list_adapters.remote(weights, env, ranks, known, published),
        )

    @contextlib.contextmanager
    def protect(self, pin: Pin | None) -> Iterator[None]:
        """Keep a pin from removal on every node, while it is being deployed."""
        if pin is None:
            yield
            return
        self._protected.append(pin.id)
        try:
            yield
        finally:
            self._protected.remove(pin.id)

    def pinned(self) -> dict[str, set[str]]:
        """Return the IDs of the pins that must be kept, each with the models that use it."""
        users: dict[str, set[str]] = {pin: set() for pin in self._protected}
        for row in self._models.deployed.values():
            if row.pin:
                users.setdefault(row.pin.id, set()).add(row.name)
        return users

    async def elsewhere(self, pin_id: str, node: str) -> tuple[list[Peer], list[str]]:
        """Return the peers, other than `node`, that have a pin; and the IDs of the pins that must be kept.

        The node's download uses the first peer, and the others if that fails. The first is the one that `distribute`
        has chosen, else the one that was first the longest time ago, so that no node feeds all others.
        """
        nodes, holders = await self._holders(pin_id, {node})
        alive = {other.id for other in nodes}
        self._last_fed = {key: count for key, count in self._last_fed.items() if key in alive}
        chosen = self._feeders.get((pin_id, node))
        holders.sort(key=lambda other: (other.id != chosen, self._last_fed.get(other.id, 0)))
        if holders:
            self._last_fed[holders[0].id] = max(self._last_fed.values(), default=0) + 1
        peers: list[Peer | None] = await call_each(
            holders, lambda other: agent_of(other.id).serve_peers.remote(), None, HOLDER_TIMEOUT_S
        )
        return [peer for peer in peers if peer], list(self.pinned())

    async def _holders(self, pin_id: str, without: Collection[str]) -> tuple[list[Node], list[Node]]:
        """Return all nodes, and those that have a pin, except the nodes with the IDs `without`."""
        nodes = await asyncio.to_thread(real_nodes)
        others = [node for node in nodes if node.id not in without]
        complete = await call_each(
            others, lambda other: agent_of(other.id).has_pin.remote(pin_id), False, HOLDER_TIMEOUT_S
        )
        return nodes, [node for node, has_pin in zip(others, complete, strict=True) if has_pin]

    async def distribute(
        self,
        pin: Pin,
        env: Mapping[str, Secret | str],
        nodes: Sequence[Node],
        operation: Operation,
        model: str = "",
        *,
        wanted: int,
        needed: int,
    ) -> None:
        """Have `wanted` of the nodes hold a pin: those that have it already, then the first ones of `nodes`.

        A node that fails is a warning, and the next one takes its place. Raises WeightsError, with each node's cause,
        if fewer than `needed` have the pin in the end.
        """
        distribution = Distribution(pin, env, self._feeders, operation, model)
        holders, missing = list[Node](), list[Node]()
        replies = await try_each(nodes, lambda node: agent_on(node.id).has_pin.remote(pin.id))
        for node, reply in zip(nodes, replies, strict=True):
            if isinstance(reply, LLMRunError):
                await distribution.fail(node, reply)
            else:
                (holders if reply else missing).append(node)
        if missing and len(holders) < wanted:
            hosts = ", ".join(node.host for node in missing[: wanted - len(holders)])
            await operation.emit("step", model, f"downloading weights {pin.weights} ({pin.short}) to {hosts}")
            _, sources = await self._holders(pin.id, {node.id for node in missing})
            holders += await distribution.run(sources, missing, wanted - len(holders))
        if len(holders) < needed:
            causes = "; ".join(f"node {host}: {cause}" for host, cause in sorted(distribution.failures.items()))
            raise WeightsError(f"{pin.weights} is on {len(holders)} of {needed} nodes: {causes}")

    async def call_with_progress(
        self, nodes: Sequence[Node], call: Callable[[Node], Any], key: str, operation: Operation, model: str = ""
    ) -> list[Any]:
        """Return the nodes' replies. Until then, emit the progress that the agents report for `key`."""
        calls = asyncio.ensure_future(call_all(nodes, call, TASK_TIMEOUT_S))
        try:
            while True:
                done, _ = await asyncio.wait([calls], timeout=PROGRESS_S)
                if done:
                    return calls.result()
                await emit_progress(nodes, key, operation, model)
        finally:
            calls.cancel()

    async def rows(self) -> list[WeightsRow]:
        """Return the weights on all nodes, each with the models that use it."""
        default: list[WeightsRow] = []
        nodes = await asyncio.to_thread(real_nodes)
        replies = await call_each(nodes, lambda node: agent_of(node.id).list_weights.remote(), default)
        users = self.pinned()
        return [
            row.model_copy(update={"pinned_by": tuple(sorted(users.get(row.pin, ())))})
            for rows in replies
            for row in rows
        ]


def _same_commit(pin: Pin, weights: Weights) -> bool:
    """Whether the source names the exact commit of the pin."""
    exact = weights.kind == "hub" and len(weights.revision) == COMMIT_LENGTH
    return exact and pin.weights == weights and pin.revision == weights.revision


def _able(placement: Placement, nodes: Sequence[Node]) -> Sequence[Node]:
    """Return the nodes that could run a model, which have its credentials; all nodes if none could."""
    return [node for node in nodes if could_run(placement, node)] or nodes


async def _first_reply(weights: Weights, nodes: Sequence[Node], call: Callable[[Node], Awaitable[T]]) -> T:
    """Return the reply of the first node that responds. Raises LLMRunError."""
    for node in nodes:
        replies: list[T | None] = await call_each([node], call, None, PIN_TIMEOUT_S + CALL_TIMEOUT_S)
        if replies[0] is not None:
            return replies[0]
    hosts = ", ".join(node.host for node in nodes)
    raise EngineError(f"cannot resolve {weights}: no node responds ({hosts or 'no nodes'}). Deploy again")
