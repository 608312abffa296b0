"""The operations of `llmrun weights …`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from llmrun.errors import Refused
from llmrun.spec import ModelSpec
from llmrun.weights import Weights
from llmrun.wire import WeightsRequest, WeightsRow
from llmrun_runtime.control.catalog.distribution import TASK_TIMEOUT_S
from llmrun_runtime.control.catalog.node_agents import call_all, call_each, reachable
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.placement import Node, Placement
from llmrun_runtime.ray_nodes import real_nodes
from llmrun_runtime.weights.pin import Pin

Run = Callable[[WeightsRequest, Sequence[Node], Operation], Awaitable[None]]


class WeightsOperations:
    """Pull, import, mirror, verify, remove and prune weights on all nodes."""

    def __init__(self, catalog: WeightsCatalog, operations: Operations) -> None:
        self._catalog = catalog
        self._operations = operations

    def start(self, request: WeightsRequest) -> Operation:
        """Start the requested operation."""
        return self._operations.start(f"weights {request.do}", lambda operation: self._run(request, operation))

    async def _run(self, request: WeightsRequest, operation: Operation) -> None:
        weights = request.weights
        if weights and weights.kind == "path":
            raise Refused(f"cannot {request.do} {weights}: a path is used in place", 409)
        methods: dict[str, Run] = {
            "pull": self._pull,
            "import": self._import,
            "mirror": self._mirror,
            "verify": self._verify,
            "remove": self._remove,
            "prune": self._prune,
        }
        await methods[request.do](request, await asyncio.to_thread(real_nodes), operation)

    async def _pull(self, request: WeightsRequest, nodes: Sequence[Node], operation: Operation) -> None:
        weights = _source_of(request)
        pin = await self._pin(weights)
        with self._catalog.protect(pin):
            await self._catalog.distribute(pin, {}, nodes, operation, wanted=len(nodes), needed=len(nodes))
        await operation.emit("done", text=f"{weights} ({pin.short}, {pin.total:,} bytes) is on every node")

    async def _import(self, request: WeightsRequest, nodes: Sequence[Node], operation: Operation) -> None:
        weights, folder, keep = _source_of(request), request.folder, list(self._catalog.pinned())
        pins: list[Pin | None] = await self._catalog.call_with_progress(
            await reachable(nodes),
            lambda node: agent_on(node.id).import_folder.remote(folder, weights, keep),
            f"{weights.canonical} {folder}",
            operation,
        )
        pin = next((pin for pin in pins if pin), None)
        if pin is None:
            hosts = ", ".join(node.host for node in nodes)
            raise Refused(f"folder {folder} not found on any node ({hosts}): copy it to one of them", 404)
        await operation.emit("done", text=f"imported {folder} as {weights} ({pin.short}, {pin.total:,} bytes)")

    async def _mirror(self, request: WeightsRequest, nodes: Sequence[Node], operation: Operation) -> None:
        weights, target = _source_of(request), request.target
        if target is None:
            raise Refused("weights mirror: a target is required, for example s3://bucket/path", 422)
        if target.kind != "store":
            raise Refused(f"cannot mirror to {target}: the target must be an object store, like s3://bucket/path", 409)
        pin = await self._pin(weights)
        with self._catalog.protect(pin):
            complete = await call_each(nodes, lambda node: agent_on(node.id).has_pin.remote(pin.id), False)
            uploader = next((node for node, has_pin in zip(nodes, complete, strict=True) if has_pin), nodes[0])
            await self._catalog.distribute(pin, {}, [uploader], operation, wanted=1, needed=1)
            await operation.emit("step", text=f"uploading to {target}")
            (files,) = await self._catalog.call_with_progress(
                [uploader], lambda node: agent_on(node.id).mirror.remote(pin, target), pin.id, operation
            )
        text = f"mirrored to {target}: {files['uploaded']} files uploaded, {files['unchanged']} already there"
        await operation.emit("done", text=text)

    async def _verify(self, request: WeightsRequest, nodes: Sequence[Node], operation: Operation) -> None:
        sources = {row.pin: f"{row.source} ({row.short})" for row in await self._rows(request.weights)}
        damaged = 0
        for pin_id, source in sources.items():
            await operation.emit("step", text=f"hashing {source}")
            problems = await self._verify_pin(nodes, pin_id)
            for node, by_pin in zip(nodes, problems, strict=True):
                for problem in by_pin.get(pin_id, ()):
                    damaged += 1
                    text = f"{source} on {node.host}: {problem}; it is downloaded again when needed"
                    await operation.emit("failed", text=text)
        if not damaged:
            await operation.emit("done", text=f"verified {len(sources)}: no damaged files")

    async def _verify_pin(self, nodes: Sequence[Node], pin_id: str) -> list[dict[str, list[str]]]:
        return await call_all(nodes, lambda node: agent_on(node.id).verify.remote([pin_id]), TASK_TIMEOUT_S)

    async def _remove(self, request: WeightsRequest, nodes: Sequence[Node], operation: Operation) -> None:
        weights = _source_of(request)
        rows = await self._rows(weights)
        users = sorted({name for row in rows for name in row.pinned_by})
        if users:
            raise Refused(f"cannot remove {weights}: in use by {', '.join(users)}. Delete them first", 409)
        ids = sorted({row.pin for row in rows})
        freed = await call_all(nodes, lambda node: agent_on(node.id).remove.remote(ids), TASK_TIMEOUT_S)
        await operation.emit("done", text=f"removed {weights}: {sum(freed):,} bytes freed")

    async def _prune(self, request: WeightsRequest, nodes: Sequence[Node], operation: Operation) -> None:
        keep = list(self._catalog.pinned())
        freed = await call_all(nodes, lambda node: agent_on(node.id).prune.remote(keep), TASK_TIMEOUT_S)
        await operation.emit("done", text=f"{sum(freed):,} bytes freed")

    async def _pin(self, weights: Weights) -> Pin:
        spec = ModelSpec(name="weights", model=weights)
        pin = await self._catalog.pin(spec, Placement(0, 0), None, fresh=True)
        assert pin
        return pin

    async def _rows(self, weights: Weights | None) -> list[WeightsRow]:
        """Return the rows of a source, or all rows. Raises Refused if no node has the source."""
        rows = await self._catalog.rows()
        if weights is None:
            return rows
        names = {weights.source, weights.canonical}
        matches = [row for row in rows if {row.source, row.pin, Weights(row.source).canonical} & names]
        if not matches:
            raise Refused(f"weights {weights} not found on any node: `llmrun weights list` shows all", 404)
        return matches


def _source_of(request: WeightsRequest) -> Weights:
    """Return the request's source. Raises Refused if it has none."""
    if request.weights is None:
        raise Refused(f"weights {request.do}: a source is required", 422)
    return request.weights
