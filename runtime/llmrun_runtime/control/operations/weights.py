"""Carries out what `llmrun weights …` asks for, each a job."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llmrun.errors import Refused
from llmrun.spec import ModelSpec
from llmrun.weights import Weights
from llmrun.wire import WeightsRequest, WeightsRow
from llmrun_runtime.control.catalog.node_agents import alive, answers, gather_from
from llmrun_runtime.control.catalog.weights import ERRAND_TIMEOUT_S, WeightsCatalog
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.placement import Node, Placement
from llmrun_runtime.ray_nodes import real_nodes
from llmrun_runtime.weights.pin import Pin


class WeightsOperations:
    """Over the stock."""

    def __init__(self, stock: WeightsCatalog, jobs: Operations) -> None:
        self._stock = stock
        self._jobs = jobs

    def start(self, request: WeightsRequest) -> Operation:
        """Begin what `llmrun weights …` asks for."""
        return self._jobs.start(f"weights {request.do}", lambda job: self._run(request, job))

    async def _run(self, request: WeightsRequest, job: Operation) -> None:
        nodes, weights = real_nodes(), request.weights
        if weights and weights.kind == "path":
            raise Refused(f"{weights}: a path is used in place: there is nothing to {request.do}", 409)
        if request.do == "pull" and weights:
            pin = await self._pin_of(weights)
            with self._stock.wanted(pin):
                await self._stock.spread(pin, {}, nodes, job)
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
            keep = list(self._stock.pinned())
            freed = await gather_from(nodes, lambda node: agent_on(node.id).prune.remote(keep), ERRAND_TIMEOUT_S)
            await job.say("done", text=f"{sum(freed):,} bytes freed")
        else:
            raise Refused(f"weights {request.do}: what for?", 422)

    async def _pin_of(self, weights: Weights) -> Pin:
        spec = ModelSpec(name="weights", model=weights)
        pin = await self._stock.pin(spec, Placement(0, 0), None, ask=True)
        assert pin
        return pin

    async def _lying(self, weights: Weights | None) -> list[WeightsRow]:
        """The rows of a source, or all. Raises Refused if there are none of that source."""
        rows = await self._stock.rows()
        if weights is None:
            return rows
        names = {weights.source, weights.canonical}
        found = [row for row in rows if {row.source, row.pin, Weights(row.source).canonical} & names]
        if not found:
            raise Refused(f"{weights}: no node has it: `llmrun weights list` shows what there is", 404)
        return found

    async def _import(self, folder: str, weights: Weights, nodes: Sequence[Node], job: Operation) -> None:
        keep = list(self._stock.pinned())
        found: list[Pin | None] = await self._stock.watched(
            await alive(nodes),
            lambda node: agent_on(node.id).take.remote(folder, weights, keep),
            f"{weights.canonical} {folder}",
            job,
        )
        pin = next((pin for pin in found if pin), None)
        if pin is None:
            hosts = ", ".join(node.host for node in nodes)
            raise Refused(f"{folder}: no node ({hosts}) has such a folder: copy it to one of them", 404)
        await job.say("done", text=f"{weights} is {folder} now ({pin.short}, {pin.total:,} bytes)")

    async def _mirror(self, weights: Weights, target: Weights, nodes: Sequence[Node], job: Operation) -> None:
        if target.kind != "store":
            raise Refused(f"{target}: weights are mirrored to a store, like s3://bucket/path", 409)
        pin = await self._pin_of(weights)
        with self._stock.wanted(pin):
            has = await answers(nodes, lambda node: agent_on(node.id).has.remote(pin.id), False)
            holder = next((node for node, here in zip(nodes, has, strict=True) if here), nodes[0])
            await self._stock.spread(pin, {}, [holder], job)
            await job.say("step", text=f"uploading to {target}")
            (sent,) = await self._stock.watched(
                [holder], lambda node: agent_on(node.id).mirror.remote(pin, target), pin.id, job
            )
        await job.say("done", text=f"{target}: {sent['sent']} files sent, {sent['there']} were there")

    async def _verify(self, rows: Collection[WeightsRow], nodes: Sequence[Node], job: Operation) -> None:
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

    async def _remove(self, weights: Weights, nodes: Sequence[Node], job: Operation) -> None:
        rows = await self._lying(weights)
        users = sorted({name for row in rows for name in row.pinned_by})
        if users:
            raise Refused(
                f"{weights}: {', '.join(users)} of what is deployed needs it: `llmrun delete` that first", 409
            )
        ids = sorted({row.pin for row in rows})
        freed = await gather_from(nodes, lambda node: agent_on(node.id).remove.remote(ids), ERRAND_TIMEOUT_S)
        await job.say("done", text=f"removed {weights}, {sum(freed):,} bytes freed")
