"""Watches the free space on the nodes' disks, for `llmrun status` and the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmrun_runtime.control.catalog.node_agents import try_each
from llmrun_runtime.node.agent import agent_of
from llmrun_runtime.node.disk_space import Disk
from llmrun_runtime.placement import Node
from llmrun_runtime.ray_nodes import real_nodes

POLL_S = 15.0
AGENT_TIMEOUT_S = 5.0
# A day of logs and a growing database fit into 1 GiB. Large disks fill faster, so 2 % of them is little, too.
LOW_BYTES = 2**30
LOW_FRACTION = 0.02


class DiskWatch(Collector):
    """The disks of the nodes whose agents run and respond, by node address."""

    def __init__(self) -> None:
        self.disks: dict[str, list[Disk]] = {}

    async def run(self) -> None:
        """Measure every POLL_S, forever. Starts no agent: one keeps its node from being removed."""
        while True:
            await self._measure(await asyncio.to_thread(real_nodes))
            await asyncio.sleep(POLL_S)

    async def _measure(self, nodes: list[Node]) -> None:
        async def ask(node: Node) -> list[Disk]:
            agent = await asyncio.to_thread(agent_of, node.id)
            disks: list[Disk] = await agent.disks.remote()
            return disks

        replies = await try_each(nodes, ask, AGENT_TIMEOUT_S)
        self.disks = {node.host: reply for node, reply in zip(nodes, replies, strict=True) if isinstance(reply, list)}

    def warnings(self) -> tuple[str, ...]:
        """A line for each disk that is almost full."""
        return tuple(
            f"node {host}: {disk.path} has {disk.free / 2**30:.1f} GiB free ({disk.free / disk.total:.0%})"
            for host, disks in sorted(self.disks.items())
            for disk in disks
            if disk.free < max(LOW_BYTES, LOW_FRACTION * disk.total)
        )

    def collect(self) -> Iterable[Metric]:
        """Yield the free space of each disk."""
        family = GaugeMetricFamily(
            "llmrun_node_disk_free_bytes", "Free space on the disk of a folder.", labels=("node", "path")
        )
        for host, disks in self.disks.items():
            for disk in disks:
                family.add_metric((host, disk.path), disk.free)
        return [family]
