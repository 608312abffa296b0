"""The weights on all nodes, as control sees them: what names mean, who has what, what must stay, how they get there.

Asks node agents; moves no bytes itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from llmrun.errors import EngineError
from llmrun.spec import ModelSpec, Secret
from llmrun.weights import Weights
from llmrun.wire import WeightsRow
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.catalog.node_agents import ANSWER_S, alive, answers, gather_from
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.control.state.operation import Operation
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.placement import Node, Placement, could_run
from llmrun_runtime.ray_nodes import real_nodes
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.weights.node_weights import PIN_TIMEOUT_S
from llmrun_runtime.weights.pin import Pin

# Hashing and uploading have no deadline of their own but this one; a transfer has its own patience.
ERRAND_TIMEOUT_S = 24 * 3600
PROGRESS_S = 0.5
KEEP_PINS = 64
T = TypeVar("T")
COMMIT_LENGTH = 40


class WeightsCatalog:
    """What control knows of weights."""

    def __init__(self, scaling: Autoscaler) -> None:
        self._scaling = scaling
        self._pins: dict[str, Pin] = {}
        self._wanted: list[str] = []

    async def pin(self, spec: ModelSpec, placement: Placement, old: Deployed | None, *, ask: bool) -> Pin | None:
        """What the model's weights mean; None for a path. Raises LLMRunError.

        1. What was imported under that name.
        2. A commit of the Hub that is deployed already: it cannot mean anything else.
        3. What the source says, asked by a node that could run the model, with its credentials.
        """
        weights = spec.model
        if weights.kind == "path":
            return None
        key = weights.model_dump_json() + spec.model_dump_json(include={"env"})
        if not ask and key in self._pins:
            return self._pins[key]
        nodes = await alive(real_nodes())
        pin = await self._imported(weights, nodes)
        if pin is None and old and old.pin and _same_commit(old.pin, weights):
            pin = old.pin
        if pin is None:
            able = _able(placement, nodes)
            asked: Pin = await _first_answer(
                weights, able, lambda node: agent_on(node.id).pin.remote(weights, spec.env)
            )
            pin = asked
        while len(self._pins) >= KEEP_PINS:
            del self._pins[next(iter(self._pins))]
        self._pins[key] = pin
        return pin

    async def _imported(self, weights: Weights, nodes: Sequence[Node]) -> Pin | None:
        found: list[tuple[float, Pin] | None] = await answers(
            nodes, lambda node: agent_on(node.id).imported.remote(weights), None
        )
        newest = max((item for item in found if item), key=lambda item: item[0], default=None)
        return newest[1] if newest else None

    async def adapters(
        self, weights: Weights, env: Mapping[str, Secret | str], placement: Placement, ranks: dict[str, int] | None
    ) -> list[Adapter]:
        """The adapters at a source now, asked as `pin` does; see `NodeWeights.adapters`. Raises LLMRunError."""
        nodes = await alive(real_nodes())
        return await _first_answer(
            weights, _able(placement, nodes), lambda node: agent_on(node.id).adapters.remote(weights, env, ranks)
        )

    @contextlib.contextmanager
    def wanted(self, pin: Pin | None) -> Iterator[None]:
        """While a pin is being deployed, no node removes it."""
        if pin is None:
            yield
            return
        self._wanted.append(pin.id)
        try:
            yield
        finally:
            self._wanted.remove(pin.id)

    def pinned(self) -> dict[str, set[str]]:
        """The pins that must stay, and the models that want them."""
        found: dict[str, set[str]] = {pin: set() for pin in self._wanted}
        for row in self._scaling.deployed.values():
            if row.pin:
                found.setdefault(row.pin.id, set()).add(row.name)
        return found

    async def elsewhere(self, pin_id: str, node: str) -> tuple[list[Peer], list[str]]:
        """How to reach the other nodes that have a pin; and the pins that must stay."""
        others = [other for other in real_nodes() if other.id != node]
        has = await answers(others, lambda other: agent_on(other.id).has.remote(pin_id), False)
        holders = [other for other, here in zip(others, has, strict=True) if here]
        peers: list[Peer | None] = await answers(holders, lambda other: agent_on(other.id).peer.remote(), None)
        return [peer for peer in peers if peer], list(self.pinned())

    async def spread(
        self, pin: Pin, env: Mapping[str, Secret | str], nodes: Sequence[Node], job: Operation, model: str = ""
    ) -> None:
        """Bring a pin to all `nodes`: to one from the store, if no node has it, and from there to the others."""
        has = await answers(nodes, lambda node: agent_on(node.id).has.remote(pin.id), None)
        # A node that has just died gets them, should it come back, when a model first wakes there.
        missing = [node for node, here in zip(nodes, has, strict=True) if here is False]
        if not missing:
            return
        elsewhere, _ = await self.elsewhere(pin.id, "")
        groups = [missing] if elsewhere else [missing[:1], missing[1:]]
        for group in groups:
            if group:
                hosts = ", ".join(node.host for node in group)
                await job.say("step", model, f"weights {pin.weights} ({pin.short}) to {hosts}")
                await self.watched(group, lambda node: agent_on(node.id).bring.remote(pin, env), pin.id, job, model)

    async def watched(
        self, nodes: Sequence[Node], call: Callable[[Node], Any], key: str, job: Operation, model: str = ""
    ) -> list[Any]:
        """The nodes' answers; meanwhile their progress is said."""
        work = asyncio.ensure_future(gather_from(nodes, call, ERRAND_TIMEOUT_S))
        try:
            while True:
                done, _ = await asyncio.wait([work], timeout=PROGRESS_S)
                if done:
                    return work.result()
                said = await answers(nodes, lambda node: agent_on(node.id).progress.remote(key), (0, 0))
                for node, (here, total) in zip(nodes, said, strict=True):
                    if total:
                        await job.say("progress", model, node.host, here, total)
        finally:
            work.cancel()

    async def rows(self) -> list[WeightsRow]:
        """What lies on all nodes, and which models have it pinned."""
        none: list[WeightsRow] = []
        found = await answers(real_nodes(), lambda node: agent_on(node.id).rows.remote(), none)
        pinned = self.pinned()
        return [
            row.model_copy(update={"pinned_by": tuple(sorted(pinned.get(row.pin, ())))})
            for rows in found
            for row in rows
        ]


def _same_commit(pin: Pin, weights: Weights) -> bool:
    """Whether the pin is of the commit that the source names."""
    named = weights.kind == "hub" and len(weights.revision) == COMMIT_LENGTH
    return named and pin.weights == weights and pin.revision == weights.revision


def _able(placement: Placement, nodes: Sequence[Node]) -> Sequence[Node]:
    """Those that could run a model, whose credentials are the right ones; all, if none could."""
    return [node for node in nodes if could_run(placement, node)] or nodes


async def _first_answer(weights: Weights, nodes: Sequence[Node], call: Callable[[Node], Awaitable[T]]) -> T:
    """What the first of the nodes that answers says of a source. Raises LLMRunError."""
    for node in nodes:
        found: list[T | None] = await answers([node], call, None, PIN_TIMEOUT_S + ANSWER_S)
        if found[0] is not None:
            return found[0]
    hosts = ", ".join(node.host for node in nodes)
    raise EngineError(f"{weights}: no node answers that could ask for it ({hosts or 'none'}): deploy again")
