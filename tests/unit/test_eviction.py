"""Whose replicas end for another model's replica, with a fake clock."""

from __future__ import annotations

from typing import Any

import pytest

from llmrun_runtime.control.autoscaling.eviction import (
    BUSY,
    IDLE,
    UNWANTED,
    EvictionCandidate,
    Turn,
    Usage,
    choose_evictions,
    rank,
    stop_order,
)
from llmrun_runtime.placement import Node, Placement
from llmrun_runtime.wire.reports import PRIORITIES
from tests.support import factories

GPU = Placement(1, 1)


def candidate(
    model: str, node: str, placement: Placement, since: float, rank: int = IDLE, replica: str = ""
) -> EvictionCandidate:
    """Return a candidate, by default an idle replica that is the model's only one."""
    return EvictionCandidate(replica or model, model, node, placement, rank, since)


@pytest.mark.parametrize(
    ("candidates", "victims"),
    [
        ([], []),
        ([("a", "n1", GPU, 5), ("b", "n1", GPU, 3), ("c", "n2", GPU, 4)], ["b"]),
        ([("a", "n1", Placement(1, 0), 1), ("b", "n1", GPU, 3)], ["b"]),  # evicting `a` would not free a GPU
        ([("a", "n3", GPU, 1)], []),  # on a node without GPUs
        ([("a", "n1", Placement(1, 0), 1)], []),
    ],
)
def test_the_replica_idle_for_longest_is_evicted(candidates: list[Any], victims: list[str]) -> None:
    full = {"CPU": 4, "GPU": 0}
    nodes = [Node(name, name, {"CPU": 8, "GPU": 2}, full) for name in ("n1", "n2")]
    nodes.append(Node("n3", "n3", {"CPU": 8}, {"CPU": 8}))
    chosen = choose_evictions(GPU, nodes, [candidate(*row) for row in candidates])
    assert [victim.model for victim in chosen] == victims


def test_two_small_replicas_are_evicted_for_a_large_one() -> None:
    nodes = [Node("n", "n", {"CPU": 8, "GPU": 2}, {"CPU": 4, "GPU": 0})]
    candidates = [candidate("a", "n", GPU, 1), candidate("b", "n", GPU, 2)]
    assert [victim.model for victim in choose_evictions(Placement(1, 2), nodes, candidates)] == ["a", "b"]


def test_a_replica_that_spans_nodes_needs_victims_on_each() -> None:
    wide = Placement(1, 2, "A10G", 2)
    full = {"CPU": 8.0, "GPU": 2, "accelerator_type:A10G": 1}
    busy = [Node(name, name, full, {"CPU": 8, "accelerator_type:A10G": 1}) for name in "ab"]
    candidates = [candidate(name, name, Placement(1, 2, "A10G"), 1) for name in "ab"]
    assert [victim.id for victim in choose_evictions(wide, busy, candidates)] == ["a", "b"]
    assert choose_evictions(wide, busy, candidates[:1]) == [], "one of two nodes is not enough"


def test_unwanted_starts_go_before_idle_replicas_and_those_before_busy_ones() -> None:
    nodes = [Node(name, name, {"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 0}) for name in "abc"]
    ranks = {"a": (BUSY, 1), "b": (IDLE, 2), "c": (UNWANTED, 3)}
    candidates = [candidate(name, name, GPU, since, rank) for name, (rank, since) in ranks.items()]
    for expected in ("c", "b", "a"):
        (victim,) = choose_evictions(GPU, nodes, candidates)
        assert victim.model == expected
        candidates.remove(victim)


def test_the_replicas_that_serve_stops_before_a_victim_end_with_it() -> None:
    nodes = [Node(name, name, {"CPU": 8, "GPU": 1}, {"CPU": 8 * (name == "b"), "GPU": 0}) for name in "ab"]
    nodes[0] = Node("a", "a", {"CPU": 8, "GPU": 1}, {"CPU": 0, "GPU": 0})
    # Serve stops the one on `a` first, but only the one on `b` makes room.
    first, second, third = (candidate("m", node, GPU, 1, replica=str(n)) for n, node in enumerate("aba"))
    small = Placement(4, 1)
    assert [victim.id for victim in choose_evictions(small, nodes, [first, second, third])] == ["0", "1"]
    other = candidate("other", "b", GPU, 2)
    victims = choose_evictions(small, nodes[1:], [first, other])
    assert [victim.id for victim in victims] == ["other"]


def test_serve_stops_first_where_it_can_give_back_a_node() -> None:
    on = {"h1": "head", "h2": "head", "a1": "a", "a2": "a", "b1": "b"}
    mine = {name: factories.report("ready", name, node=node) for name, node in on.items()}
    other = factories.report("ready", "x", model="other", node="b")
    seen = {name: float(n) for n, name in enumerate(on)}
    order = stop_order(mine.values(), [*mine.values(), other], seen, "head")
    assert [report.id for report in order] == ["a2", "a1", "b1", "h2", "h1"]
    order = stop_order(mine.values(), mine.values(), seen, "head")
    assert order[0].id == "b1"


def usage(**fields: Any) -> Usage:
    """Return the usage at t=1000 of a replica that became ready at t=500 and was last used at t=900."""
    defaults: dict[str, Any] = {
        **{"now": 1000.0, "quiet_since": 900.0, "ready_since": 500.0},
        **{"served": True, "warmed": False, "min_uptime": 60.0},
    }
    return Usage(**(defaults | fields))


@pytest.mark.parametrize(
    ("fields", "gives_way", "expected"),
    [
        ({}, False, IDLE),
        ({"ready_since": 950.0}, False, None),  # min_uptime
        ({"quiet_since": 0.0}, False, None),
        ({"quiet_since": 0.0}, True, BUSY),
        ({"quiet_since": 0.0, "ready_since": 950.0}, True, None),
        ({"ready_since": 0.0, "served": False}, False, UNWANTED),  # it starts, and its caller has left
        ({"ready_since": 990.0, "served": False}, False, UNWANTED),
        ({"ready_since": 990.0, "served": False, "warmed": True}, False, None),  # `llmrun warm`
        ({"ready_since": 999.0, "served": False, "quiet_since": 999.5}, False, None),  # its request is on its way
        ({"ready_since": 0.0, "served": False, "quiet_since": 0.0}, True, None),
    ],
)
def test_what_protects_a_replica(fields: dict[str, Any], gives_way: bool, expected: int | None) -> None:
    assert rank(usage(**fields), gives_way) == expected


@pytest.mark.parametrize(
    ("waiting", "busy", "waited", "takes"),
    [
        *(("normal", "normal", waited, waited >= 30) for waited in (29, 30)),
        *(("high", "normal", waited, waited >= 30) for waited in (29, 30)),
        *(("batch", "batch", waited, waited >= 30) for waited in (29, 30)),
        ("batch", "normal", 10**6, False),
        ("batch", "high", 10**6, False),
        ("normal", "batch", 0, True),
        ("high", "batch", 0, True),
        ("normal", "high", 30, True),
    ],
)
def test_turns_go_by_priority(waiting: Any, busy: Any, waited: float, takes: bool) -> None:
    assert Turn(PRIORITIES.index(waiting), waited, 30).takes_from(PRIORITIES.index(busy)) == takes
