"""Starts one replica of a new version as proof that the version works, before it becomes active."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from llmrun.settings import Settings
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.state.models import Candidate, Deployed, Models
from llmrun_runtime.control.state.operation import Operation
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.placement import Node, Placement, could_run, has_capacity
from llmrun_runtime.ray_nodes import cluster_nodes
from llmrun_runtime.wire.reports import ReplicaReport

PREPARE_TIMEOUT_S = 1800
POLL_S = 0.1
# Reading the nodes' resources costs more than a look at the registry.
CAPACITY_POLL_S = 0.5
# Ray's count of free resources lags by some tenths of a second, and a replica takes a moment to end. Wait this long for
# resources to become free before draining the active version.
SETTLE_S = 3.0


@dataclass
class Proof:
    """The state of a version's first replica."""

    placement: Placement
    placed: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    cause: str = ""
    """Why the replica failed; "" if it is ready."""
    warning: str = ""


class Prover:
    """Find capacity for proofs, and run them."""

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        models: Models,
        autoscaler: Autoscaler,
        serve_apps: ServeApps,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._models = models
        self._autoscaler = autoscaler
        self._serve_apps = serve_apps
        self._proofs: dict[tuple[str, int], Proof] = {}
        """By model and engine version."""

    def on_report(self, report: ReplicaReport, cause: str = "") -> bool:
        """Process a replica's report, with the cause if it failed. Return whether the replica belongs to a proof."""
        proof = self._proofs.get((report.model, report.version))
        if not proof:
            return False
        proof.placed.set()
        if cause or report.state == "ready":
            proof.cause, proof.warning = cause, report.warning
            proof.done.set()
        return True

    async def free_capacity(self, row: Deployed, old: Deployed | None, operation: Operation) -> str:
        """Make sure that a replica of `row` fits, draining the old version if needed.

        Return "" if it fits, else what is missing. The model stays locked if the old version was drained.
        """
        if _autoscaler_fits(row):
            return ""
        if await self._wait_for_capacity(row, SETTLE_S):
            return ""
        if not old or not await self.fits_without(row, [row.name]):
            return self._autoscaler.shortage(row, await self._nodes())
        text = f"not enough capacity next to version {old.version}: draining it first, requests are queued"
        await operation.emit("step", row.name, text)
        self._models.lock(row.name)
        await self._serve_apps.set_target(old, 0)
        drained = await self.wait_until_gone([row.name])
        if drained and await self._wait_for_capacity(row, self._settings.place_timeout):
            return ""
        self._models.unlock(row.name)
        return self._autoscaler.shortage(row) or f"version {old.version} did not drain in time"

    async def fits_without(self, row: Deployed, models: Collection[str]) -> bool:
        """Whether a replica of `row` fits once the replicas of these models have stopped; False if they have none."""
        freed: dict[str, list[Placement]] = {}
        for model in models:
            for report in self._registry.replicas_of(model):
                freed.setdefault(report.node, []).append(self._models.deployed[model].placement)
        return bool(freed) and has_capacity(row.placement, await self._nodes(), freed)

    async def wait_until_gone(self, models: Collection[str]) -> bool:
        """Wait until the replicas of models have drained. Return False if some have not in time."""
        return await _wait_until(lambda: not any(map(self._registry.replicas_of, models)), self._settings.drain_timeout)

    async def prove(self, row: Deployed, operation: Operation, *, in_place: bool = False) -> str:
        """Start one replica. Return "" once it is ready, else the cause of the failure.

        `in_place`: the version is active already. The autoscaler places the replica, and evicts idle models for it.
        """
        proof = self._proofs[row.name, row.engine_version] = Proof(row.placement)
        try:
            waits_for_node = _waits_for_node(row)
            text = f"version {row.version}: placing a replica on {row.placement}"
            await operation.emit("step", row.name, text + (" that the autoscaler must add" if waits_for_node else ""))
            if in_place:
                self._autoscaler.warm(row.name)
            else:
                self._models.candidates[row.name] = Candidate(row)
                await self._serve_apps.set_target(row, 1)
            limit_s = self._placing_limit(row)
            if in_place:
                limit_s += self._settings.drain_timeout
            if not await _wait_until(proof.placed.is_set, limit_s):
                return await self._not_placed(row, limit_s)
            host = next((report.host for report in self._registry.replicas_of(row.name, row.engine_version)), "")
            await operation.emit("step", row.name, f"starting the engine on node {host}")
            # The replica enforces start_timeout itself. The rest is for preparing its node, and for its report.
            limit_s = self._settings.start_timeout + PREPARE_TIMEOUT_S
            if not await _wait_until(proof.done.is_set, limit_s):
                return f"the replica did not report within {limit_s:g} s"
            if proof.warning and not proof.cause:
                await operation.emit("warning", row.name, proof.warning)
            return proof.cause
        finally:
            del self._proofs[row.name, row.engine_version]

    async def match(self, row: Deployed, old: Deployed, operation: Operation) -> None:
        """Start as many replicas of a proven version as the old version has, where they fit next to those.

        Returns when they are ready, or when no more of them can be.
        """
        wanted = min(len(self._registry.ready(old.name, old.engine_version)), row.spec.max_replicas)
        if wanted <= 1:
            return
        text = f"starting {wanted} replicas, as many as version {old.version} has"
        await operation.emit("step", row.name, text)
        proof = self._proofs[row.name, row.engine_version] = Proof(row.placement)
        try:
            await self._serve_apps.set_target(row, wanted)
            fits = await self._wait_for_replicas(row, wanted, proof)
            ready = len(self._registry.ready(row.name, row.engine_version))
            if ready < wanted:
                cause = proof.cause or ("they were not ready in time" if fits else "not enough capacity for more")
                await operation.emit("step", row.name, f"continuing with {ready} of {wanted} replicas: {cause}")
                await self._serve_apps.set_target(row, max(1, ready))
        finally:
            del self._proofs[row.name, row.engine_version]

    async def _wait_for_replicas(self, row: Deployed, wanted: int, proof: Proof) -> bool:
        """Wait until that many replicas are ready, or one has failed. Return False if some cannot be placed."""
        started, next_look, fits = time.monotonic(), 0.0, True
        settle_s = self._placing_limit(row) if _autoscaler_fits(row) else SETTLE_S
        unplaced_since = 0.0
        while (now := time.monotonic()) - started < self._settings.start_timeout + PREPARE_TIMEOUT_S:
            if proof.cause or len(self._registry.ready(row.name, row.engine_version)) >= wanted:
                return True
            placed = self._registry.placed(row.name, row.engine_version)
            if len(placed) < wanted and now >= next_look:
                nodes = await asyncio.to_thread(cluster_nodes)
                fits, next_look = has_capacity(row.placement, nodes), now + CAPACITY_POLL_S
            unplaced_since = 0.0 if len(placed) >= wanted or fits else unplaced_since or now
            # Those that are placed still become ready: they carry what the old version's replicas carried.
            if unplaced_since and now - unplaced_since > settle_s and all(r.state == "ready" for r in placed):
                return False
            await asyncio.sleep(POLL_S)
        return True

    def _placing_limit(self, row: Deployed) -> float:
        """How long placing a replica may take, in seconds: longer if the cluster's autoscaler must add a node."""
        return self._settings.start_timeout if _waits_for_node(row) else self._settings.place_timeout

    async def _not_placed(self, row: Deployed, limit_s: float) -> str:
        limit = f"no replica was placed within {limit_s:g} s"
        if limit_s == self._settings.place_timeout:
            limit += " (LLMRUN_PLACE_TIMEOUT)"
        elif limit_s == self._settings.start_timeout:
            limit += " (LLMRUN_START_TIMEOUT), in which the autoscaler added no node for it"
        error = await self._serve_apps.last_error(row.name, row.engine_version) or self._autoscaler.shortage(row)
        return f"{limit}: {error or 'Ray reports no reason'}"

    async def _wait_for_capacity(self, row: Deployed, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not has_capacity(row.placement, await self._nodes()):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(CAPACITY_POLL_S)
        return True

    async def _nodes(self) -> list[Node]:
        """Return the nodes, without the resources that the replicas of other proofs are about to take."""
        # A proof that is placed while the nodes are read may be missing in them.
        unplaced = [proof for proof in self._proofs.values() if not proof.placed.is_set()]
        nodes = await asyncio.to_thread(cluster_nodes)
        unplaced += [proof for proof in self._proofs.values() if not proof.placed.is_set() and proof not in unplaced]
        for proof in unplaced:
            nodes = _without(proof.placement, nodes)
        return nodes


def _without(placement: Placement, nodes: list[Node]) -> list[Node]:
    """Return the nodes with a replica on the first ones that it fits."""
    missing, share, left = placement.nodes, replace(placement, nodes=1), []
    for node in nodes:
        if missing and has_capacity(share, [node]):
            taken = share.resources()
            available = {key: amount - taken.get(key, 0) for key, amount in node.available.items()}
            left.append(replace(node, available=available))
            missing -= 1
        else:
            left.append(node)
    return left


def _autoscaler_fits(row: Deployed) -> bool:
    """Whether the cluster's autoscaler can add a node that fits."""
    return any(not node.id and could_run(row.placement, node) for node in cluster_nodes())


def _waits_for_node(row: Deployed) -> bool:
    """Whether a replica fits only on a node that the cluster's autoscaler must add."""
    return _autoscaler_fits(row) and not has_capacity(row.placement, cluster_nodes())


async def _wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL_S)
    return True
