"""Finds room for a model's replicas: whose replicas end for it, and who waits while another goes first.

The decisions about single replicas are in `eviction`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from llmrun_runtime.control.autoscaling.eviction import (
    BUSY,
    EvictionCandidate,
    Turn,
    Usage,
    choose_evictions,
    rank,
    stop_order,
)
from llmrun_runtime.control.autoscaling.model_state import ModelState, RoomSearch
from llmrun_runtime.control.autoscaling.policy import Demand
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.placement import Node, could_run, has_capacity, shortage
from llmrun_runtime.wire.reports import ReplicaReport

log = logging.getLogger("llmrun.control")
# A replica reports once its worker has started. One that has not reported after this time counts as not placed.
PLACING_S = 4.0
# Serve ended another replica than expected, or none: this model loses no more until then.
SPARED_S = 30.0
# How long the cluster's autoscaler has to add a node before busy models give way.
NODE_S = 300.0


class Capacity:
    """The search for room. `nodes` returns the cluster's nodes, `head` the id of its head node."""

    def __init__(
        self,
        *,
        models: Models,
        registry: Registry,
        serve_apps: ServeApps,
        states: Mapping[str, ModelState],
        nodes: Callable[[], list[Node]],
        head: Callable[[], str],
    ) -> None:
        self._models = models
        self._registry = registry
        self._serve_apps = serve_apps
        self._states = states
        self._nodes = nodes
        self._head = head

    def min_replicas(self, row: Deployed) -> int:
        """Return the replicas to keep without requests."""
        if self._states[row.name].unloaded:
            return 0
        return max(row.spec.min_replicas, int(row.spec.scheduled(time.time())))

    def placed(self, row: Deployed) -> list[ReplicaReport]:
        """Return the replicas that are starting or ready, without those that end for another model."""
        state = self._states.get(row.name)
        placed = self._registry.placed(row.name, row.engine_version)
        return [r for r in placed if r.id not in state.ending] if state and state.ending else placed

    def nodes_for(self, row: Deployed) -> list[Node]:
        """Return the nodes that the model may use: those that are not set aside."""
        state = self._states.get(row.name)
        return [node for node in self._nodes() if not (state and node.id in state.set_aside)]

    def set_nodes_aside(self, row: Deployed, now: float) -> None:
        """Update which nodes the model's replicas avoid, because their starts fail there."""
        able = {node.id for node in self._nodes() if could_run(row.placement, node)}
        state = self._states[row.name]
        state.set_aside = state.bad_nodes.set_aside(able, now)

    def shortage(self, row: Deployed, nodes: list[Node] | None = None) -> str:
        """Say why a replica of the version cannot be placed now, and which models use resources; "" if it can.

        `nodes`: where it may be placed, if that differs from the cluster's nodes as they are.
        """
        nodes = self.nodes_for(row) if nodes is None else nodes
        if has_capacity(row.placement, nodes):
            return ""
        users = sorted({report.model for report, _ in self._registry.replicas.values()})
        return shortage(row.placement, nodes, users)

    def in_order(self) -> list[Deployed]:
        """Return the models in the order in which they get room: by priority, then those that wait for longest."""
        first = {
            name: (-self._registry.waiting_priority(name), state.search.unplaced_since)
            for name, state in self._states.items()
            if state.search.unplaced_since
        }
        rows = self._models.deployed
        return [*(rows[name] for name in sorted(first, key=first.__getitem__) if name in rows)] + [
            row for name, row in rows.items() if name not in first
        ]

    def search(self, row: Deployed, demand: Demand, wanted: int) -> dict[str, int]:
        """Look for room if a wanted replica is not placed. Return the new, lower targets of the models that give room.

        1. All wanted replicas are placed: there is nothing to look for.
        2. The chosen victims end, or have just ended: wait for that, then for Ray to place the replica.
        3. The target rises, or it did not fit: look at once. Else after PLACING_S: a worker takes time to start.
        4. It fits, or it is only a retry after failures: evict none.
        5. Choose victims.
        """
        now, state = demand.now, self._states[row.name]
        search = state.search
        # 1.
        if wanted <= demand.placed:
            for victim in search.victims.values():
                self._forget_victim(victim)
            state.search = RoomSearch()
            state.evicted = "" if demand.placed else state.evicted
            return {}
        search.unplaced_since = search.unplaced_since or now
        # 2.
        if search.victims:
            self._check_victims(search, now)
        if search.reserves(now):
            return {}
        # 3. The model's own draining replica may free its resources in a moment.
        draining = any(r.state == "draining" for r in self._registry.replicas_of(row.name))
        placing = (wanted <= demand.target or draining) and not search.shortage
        if placing and now - search.unplaced_since <= PLACING_S:
            return {}
        # 4.
        search.shortage = self.shortage(row)
        requested = demand.waiting or demand.in_flight or wanted <= self.min_replicas(row)
        if not search.shortage or not requested:
            return {}
        # 5.
        nodes = self.nodes_for(row)
        victims = choose_evictions(row.placement, nodes, self._candidates(row, demand, nodes))
        search.victims = {victim.id: victim for victim in victims}
        search.started, search.freed, search.announced = now, 0, False
        search.room = frozenset(victim.node for victim in victims)
        return self._targets_without(victims, row, now - search.unplaced_since)

    def _check_victims(self, search: RoomSearch, now: float) -> None:
        """Forget the victims that have ended, and those that Serve has not even begun to end after PLACING_S."""
        late = now - search.started > PLACING_S
        for victim in list(search.victims.values()):
            if self._registry.is_registered(victim.id, draining=late):
                continue
            del search.victims[victim.id]
            self._forget_victim(victim)
            if self._registry.is_registered(victim.id, draining=False) and (state := self._states.get(victim.model)):
                log.warning("%s: Serve did not end the replica %s", victim.model, victim.id[:12])
                state.spared_until = now + SPARED_S
                search.room -= {victim.node}
        if search.victims:
            models = ", ".join(dict.fromkeys(victim.model for victim in search.victims.values()))
            busy = any(victim.rank == BUSY for victim in search.victims.values())
            turn, eviction = f"waiting for its turn: {models} yields", f"waiting for the eviction of {models}"
            search.shortage = turn if busy else eviction
        else:
            search.freed, search.shortage = now, ""

    def _forget_victim(self, victim: EvictionCandidate) -> None:
        if state := self._states.get(victim.model):
            state.ending.discard(victim.id)

    def _targets_without(self, victims: list[EvictionCandidate], row: Deployed, waited: float) -> dict[str, int]:
        """Return the targets of the victims' models without them, and record the reason in their states."""
        targets = {}
        for model in dict.fromkeys(victim.model for victim in victims):
            gone, state = [victim for victim in victims if victim.model == model], self._states[model]
            state.ending |= {victim.id for victim in gone}
            # Serve stops replicas that are not placed first.
            targets[model] = len(self.placed(self._models.deployed[model]))
            busy = any(victim.rank == BUSY for victim in gone)
            text = (
                f"giving way to {row.name} after {waited:.0f} s"
                if busy
                else f"evicted to free resources for {row.name}"
            )
            self._states[model].evicted = text
            log.info("%s: %d replicas end: %s", model, len(gone), text)
        return targets

    def _candidates(self, row: Deployed, demand: Demand, nodes: list[Node]) -> list[EvictionCandidate]:
        """Return the replicas of other models that may end, each model's in the order in which Serve stops them."""
        registry, now = self._registry, demand.now
        max_wait = row.spec.max_wait_for_room
        if any(not node.id and could_run(row.placement, node) for node in nodes):
            max_wait = max(max_wait, NODE_S)
        # A model that serves requests already takes none from others.
        waits = registry.waiting(row.name) and not demand.placed
        waited = now - self._states[row.name].search.unplaced_since
        turn = Turn(registry.waiting_priority(row.name), waited, max_wait)
        running = [report for report, _ in registry.replicas.values() if report.state != "draining"]
        candidates = []
        for other in self._models.deployed.values():
            name, state = other.name, self._states[other.name]
            if name == row.name or not other.spec.evictable or self._models.is_locked(name):
                continue
            if state.spared_until > now or state.setting_target:
                continue
            placed = self.placed(other)
            spare = min(self._serve_apps.target(name, other.engine_version), len(placed)) - self.min_replicas(other)
            if spare <= 0:
                continue
            quiet_since = registry.quiet_since(name, other.engine_version, now)
            gives_way = bool(waits) and turn.takes_from(registry.priority(name))
            for report in stop_order(placed, running, registry.first_seen, self._head())[:spare]:
                ready_since = registry.ready_since.get(report.id, 0)
                served = report.id in registry.served
                usage = Usage(now, quiet_since, ready_since, served, state.warmed, other.spec.min_uptime)
                found = rank(usage, gives_way)
                if found is None:  # Serve would stop this one before the others
                    break
                since = ready_since + other.spec.min_uptime if found == BUSY else quiet_since
                candidates.append(EvictionCandidate(report.id, name, report.node, other.placement, found, since))
        return candidates

    def held(self, row: Deployed, demand: Demand, wanted: int) -> str:
        """Say which model goes first, if this one must not get another replica now; "" if it may.

        Another model goes first while victims end for it, or if it waits for room with a higher priority. It holds back
        only those that would need the same nodes.
        """
        if wanted <= demand.placed:
            return ""
        own, priority = self._states[row.name].search, self._registry.waiting_priority(row.name)
        for name, state in self._states.items():
            search = state.search
            if name == row.name or not search.unplaced_since or self._models.is_locked(name):
                continue
            other, theirs = self._models.get(name), self._registry.waiting_priority(name)
            if not other or theirs < priority or (theirs == priority and own.victims):
                continue
            reserved = search.room if search.reserves(demand.now) else frozenset()
            if not reserved and not (search.shortage and theirs > priority):
                continue
            nodes = self.nodes_for(row)
            shared = [n for n in nodes if n.id and could_run(row.placement, n) and could_run(other.placement, n)]
            rest = [node for node in nodes if node.id not in reserved]
            elsewhere = has_capacity(row.placement, rest) or any(
                not node.id and could_run(row.placement, node) for node in nodes
            )
            if not elsewhere and any(not reserved or node.id in reserved for node in shared):
                mine = self._states[row.name].evicted
                return mine if mine and f" {name} " in f"{mine} " else f"waiting for its turn: {name} goes first"
        return ""
