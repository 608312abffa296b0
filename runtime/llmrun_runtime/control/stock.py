"""The weights on all nodes, as control sees them: what names mean, who has what, what must stay, and errands.

Asks node agents; moves no bytes itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ray

from llmrun.errors import EngineError, LLMRunError, Refused
from llmrun.spec import ModelSpec, Secret
from llmrun.weights import Weights
from llmrun.wire import WeightsRequest, WeightsRow
from llmrun_runtime.control.database import Deployed
from llmrun_runtime.control.events import Job, Jobs
from llmrun_runtime.control.placing import Node, Placement, could_run
from llmrun_runtime.control.scaling import Scaling
from llmrun_runtime.control.serving import cluster_nodes
from llmrun_runtime.node import agent_on
from llmrun_runtime.weights.node import PIN_TIMEOUT_S
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.weights.sync import Peer

T = TypeVar("T")
log = logging.getLogger("llmrun.control")
ANSWER_S = 20
# Hashing and uploading have no deadline of their own but this one; a transfer has its own patience.
ERRAND_TIMEOUT_S = 24 * 3600
PROGRESS_S = 0.5
KEEP_PINS = 64
COMMIT_LENGTH = 40


class Silent(EngineError):
    """A node's agent does not answer."""


class Stock:
    """What control knows of weights."""

    def __init__(self, scaling: Scaling, jobs: Jobs) -> None:
        self._scaling = scaling
        self._jobs = jobs
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
        nodes = real_nodes()
        pin = await self._imported(weights, nodes)
        if pin is None and old and old.pin and _same_commit(old.pin, weights):
            pin = old.pin
        if pin is None:
            able = [node for node in nodes if could_run(placement, node)]
            pin = await self._ask(weights, spec.env, able or nodes)
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

    async def _ask(self, weights: Weights, env: Mapping[str, Secret | str], nodes: Sequence[Node]) -> Pin:
        """What the first of the nodes that answers says. Raises LLMRunError."""
        for node in nodes:
            found: list[Pin | None] = await answers(
                [node], lambda node: agent_on(node.id).pin.remote(weights, env), None, PIN_TIMEOUT_S + ANSWER_S
            )
            if found[0]:
                return found[0]
        hosts = ", ".join(node.host for node in nodes)
        raise EngineError(f"{weights}: no node that could run it answers ({hosts}): did it just go? Deploy again")

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
        self, pin: Pin, env: Mapping[str, Secret | str], nodes: Sequence[Node], job: Job, model: str = ""
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
                await self._watched(group, lambda node: agent_on(node.id).bring.remote(pin, env), pin.id, job, model)

    async def _watched(
        self, nodes: Sequence[Node], call: Callable[[Node], Any], key: str, job: Job, model: str = ""
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

    def start(self, request: WeightsRequest) -> Job:
        """Begin what `llmrun weights …` asks for."""
        return self._jobs.start(f"weights {request.do}", lambda job: self._run(request, job))

    async def _run(self, request: WeightsRequest, job: Job) -> None:
        nodes, weights = real_nodes(), request.weights
        if weights and weights.kind == "path":
            raise Refused(f"{weights}: a path is used in place: there is nothing to {request.do}", 409)
        if request.do == "pull" and weights:
            pin = await self._pin_of(weights)
            with self.wanted(pin):
                await self.spread(pin, {}, nodes, job)
            await job.say("done", text=f"{weights} ({pin.short}, {pin.total:,} bytes) is on every node")
        elif request.do == "import" and weights:
            await self._import(request.folder, weights, nodes, job)
        elif request.do == "mirror" and weights and request.target:
            await self._mirror(weights, request.target, nodes, job)
        elif request.do == "verify":
            await self._verify(await self._lying(weights), nodes, job)
        elif request.do == "remove" and weights:
            await self._remove(weights, nodes, job)
        elif request.do == "prune":
            keep = list(self.pinned())
            freed = await gather_from(nodes, lambda node: agent_on(node.id).prune.remote(keep), ERRAND_TIMEOUT_S)
            await job.say("done", text=f"{sum(freed):,} bytes freed")
        else:
            raise Refused(f"weights {request.do}: what for?", 422)

    async def _pin_of(self, weights: Weights) -> Pin:
        spec = ModelSpec(name="weights", model=weights)
        pin = await self.pin(spec, Placement(0, 0), None, ask=True)
        assert pin
        return pin

    async def _lying(self, weights: Weights | None) -> list[WeightsRow]:
        """The rows of a source, or all. Raises Refused if there are none of that source."""
        rows = await self.rows()
        if weights is None:
            return rows
        names = {weights.source, weights.canonical}
        found = [row for row in rows if {row.source, row.pin, Weights(row.source).canonical} & names]
        if not found:
            raise Refused(f"{weights}: no node has it: `llmrun weights list` shows what there is", 404)
        return found

    async def _import(self, folder: str, weights: Weights, nodes: Sequence[Node], job: Job) -> None:
        keep = list(self.pinned())
        alive = await answers(nodes, lambda node: agent_on(node.id).has.remote(""), None)
        nodes = [node for node, answer in zip(nodes, alive, strict=True) if answer is not None]
        found: list[Pin | None] = await self._watched(
            nodes,
            lambda node: agent_on(node.id).take.remote(folder, weights, keep),
            f"{weights.canonical} {folder}",
            job,
        )
        pin = next((pin for pin in found if pin), None)
        if pin is None:
            hosts = ", ".join(node.host for node in nodes)
            raise Refused(f"{folder}: no node ({hosts}) has such a folder: copy it to one of them", 404)
        await job.say("done", text=f"{weights} is {folder} now ({pin.short}, {pin.total:,} bytes)")

    async def _mirror(self, weights: Weights, target: Weights, nodes: Sequence[Node], job: Job) -> None:
        if target.kind != "store":
            raise Refused(f"{target}: weights are mirrored to a store, like s3://bucket/path", 409)
        pin = await self._pin_of(weights)
        with self.wanted(pin):
            has = await answers(nodes, lambda node: agent_on(node.id).has.remote(pin.id), False)
            holder = next((node for node, here in zip(nodes, has, strict=True) if here), nodes[0])
            await self.spread(pin, {}, [holder], job)
            await job.say("step", text=f"uploading to {target}")
            (sent,) = await self._watched(
                [holder], lambda node: agent_on(node.id).mirror.remote(pin, target), pin.id, job
            )
        await job.say("done", text=f"{target}: {sent['sent']} files sent, {sent['there']} were there")

    async def _verify(self, rows: Collection[WeightsRow], nodes: Sequence[Node], job: Job) -> None:
        sources = {row.pin: f"{row.source} ({row.short})" for row in rows}
        damaged = 0
        for pin_id, source in sources.items():
            await job.say("step", text=f"hashing {source}")
            found = await self._verified(nodes, pin_id)
            for node, wrong in zip(nodes, found, strict=True):
                for line in wrong.get(pin_id, ()):
                    damaged += 1
                    await job.say("failed", text=f"{source} on {node.host}: {line}; it is fetched again when needed")
        if not damaged:
            await job.say("done", text=f"{len(sources)} checked, all right")

    async def _verified(self, nodes: Sequence[Node], pin_id: str) -> list[dict[str, list[str]]]:
        return await gather_from(nodes, lambda node: agent_on(node.id).verify.remote([pin_id]), ERRAND_TIMEOUT_S)

    async def _remove(self, weights: Weights, nodes: Sequence[Node], job: Job) -> None:
        rows = await self._lying(weights)
        users = sorted({name for row in rows for name in row.pinned_by})
        if users:
            raise Refused(
                f"{weights}: {', '.join(users)} of what is deployed needs it: `llmrun delete` that first", 409
            )
        ids = sorted({row.pin for row in rows})
        freed = await gather_from(nodes, lambda node: agent_on(node.id).remove.remote(ids), ERRAND_TIMEOUT_S)
        await job.say("done", text=f"removed {weights}, {sum(freed):,} bytes freed")


def _same_commit(pin: Pin, weights: Weights) -> bool:
    """Whether the pin is of the commit that the source names."""
    named = weights.kind == "hub" and len(weights.revision) == COMMIT_LENGTH
    return named and pin.weights == weights and pin.revision == weights.revision


def real_nodes() -> list[Node]:
    """The nodes that live."""
    return [node for node in cluster_nodes() if node.id]


async def answers(
    nodes: Sequence[Node], call: Callable[[Node], Awaitable[T]], none: T, timeout: float = ANSWER_S
) -> list[T]:
    """The answers of the nodes' agents, in their order; `none` for one that does not answer: it may have just died.

    Raises the LLMRunError of one.
    """

    async def answer(node: Node) -> T:
        try:
            return (await gather_from([node], call, timeout))[0]
        except Silent as error:
            log.warning("%s", error)
            return none

    return list(await asyncio.gather(*map(answer, nodes)))


async def gather_from(
    nodes: Sequence[Node], call: Callable[[Node], Awaitable[T]], timeout: float = ANSWER_S
) -> list[T]:
    """The answers of the nodes' agents, in their order. Raises the LLMRunError of one, or Silent."""
    try:
        async with asyncio.timeout(timeout):
            return list(await asyncio.gather(*(call(node) for node in nodes)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LLMRunError):
            raise error.cause from None
        raise
    except (ray.exceptions.RayError, TimeoutError) as error:
        hosts = ", ".join(node.host for node in nodes)
        raise Silent(f"one of the nodes {hosts} does not answer: {type(error).__name__}") from error
