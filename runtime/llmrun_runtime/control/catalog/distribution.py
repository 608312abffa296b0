"""Downloads one pin to several nodes. Nodes that have it send it to the others, so that no node feeds all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from llmrun.errors import LLMRunError
from llmrun.spec import Secret
from llmrun_runtime.control.catalog.node_agents import call_each, try_each
from llmrun_runtime.control.state.operation import Operation
from llmrun_runtime.node.agent import agent_of, agent_on
from llmrun_runtime.placement import Node
from llmrun_runtime.weights.pin import Pin

# The only limit on hashing and uploading; a download also has a limit of its own in the worker.
TASK_TIMEOUT_S = 24 * 3600
PROGRESS_S = 0.5
PROGRESS_TIMEOUT_S = 1.5
Feeders = dict[tuple[str, str], str]
"""The node that sends a pin, by the pin and the node that downloads it."""


class Distribution:
    """The downloads of one pin. `feeders` is updated as they start and end."""

    def __init__(
        self, pin: Pin, env: Mapping[str, Secret | str], feeders: Feeders, operation: Operation, model: str
    ) -> None:
        self.failures: dict[str, str] = {}
        """The causes by the nodes' addresses."""
        self._pin = pin
        self._env = env
        self._feeders = feeders
        self._operation = operation
        self._model = model

    async def fail(self, node: Node, cause: LLMRunError) -> None:
        """Record that a node has failed, as a warning."""
        self.failures[node.host] = str(cause)
        text = f"node {node.host}: cannot download the weights: {cause}. Tried again when the model wakes there"
        await self._operation.emit("warning", self._model, text)

    async def run(self, sources: Sequence[Node], missing: Sequence[Node], wanted: int) -> list[Node]:
        """Download to the first `wanted` of `missing`, others in place of those that fail. Return those that have it.

        Each source, then each node that has the pin, sends it to one node at a time: in each round, their number
        doubles. As long as there is none, one node downloads from the store; after a failure, twice as many do.
        """
        feeding, queue, done = list(sources), deque(missing), list[Node]()
        running: dict[asyncio.Task[str | LLMRunError], Node] = {}
        try:
            while True:
                limit = min(len(feeding) or len(self.failures) + 1, wanted - len(done))
                while queue and len(running) < limit:
                    node = queue.popleft()
                    self._choose_feeder(node, feeding, running.values())
                    running[asyncio.ensure_future(self._fetch(node))] = node
                if not running:
                    return done
                ended, _ = await asyncio.wait(running, timeout=PROGRESS_S, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    node = running.pop(task)
                    self._feeders.pop((self._pin.id, node.id), None)
                    if isinstance(reply := task.result(), LLMRunError):
                        await self.fail(node, reply)
                    else:
                        done.append(node)
                        feeding.append(node)
                if not ended:
                    await emit_progress(list(running.values()), self._pin.id, self._operation, self._model)
        finally:
            for task, node in running.items():
                self._feeders.pop((self._pin.id, node.id), None)
                task.cancel()  # the node's agent finishes the download, for the next deploy

    def _choose_feeder(self, node: Node, feeding: Sequence[Node], downloading: Iterable[Node]) -> None:
        """Have a source that feeds no other node feed this one, if there is such a source."""
        busy = {self._feeders.get((self._pin.id, other.id)) for other in downloading}
        for source in feeding:
            if source.id not in busy:
                self._feeders[self._pin.id, node.id] = source.id
                return

    async def _fetch(self, node: Node) -> str | LLMRunError:
        replies: list[str | LLMRunError] = await try_each(
            [node], lambda node: agent_on(node.id).fetch.remote(self._pin, self._env), TASK_TIMEOUT_S
        )
        return replies[0]


async def emit_progress(nodes: Sequence[Node], key: str, operation: Operation, model: str) -> None:
    """Emit the progress that the nodes' agents report for `key`."""
    progress = await call_each(nodes, lambda node: agent_of(node.id).progress.remote(key), (0, 0), PROGRESS_TIMEOUT_S)
    for node, (transferred, total) in zip(nodes, progress, strict=True):
        if total:
            await operation.emit("progress", model, node.host, transferred, total)
