"""The scaling rule, with a clock of its own."""

from __future__ import annotations

from typing import Any

import pytest

from llmrun_runtime.scaler import Decision, Demand, Failure, Limits, decide

LIMITS = Limits(min_replicas=0, max_replicas=4, target_ongoing_requests=10, idle_timeout=60)


def demand(**given: Any) -> Demand:
    """A model at rest at t=1000, last used just now, unless `given` says otherwise."""
    facts: dict[str, Any] = {
        "now": 1000.0,
        "target": 0,
        "ready": 0,
        "waiting": 0,
        "in_flight": 0,
        "last_used": 1000.0,
        "low_since": 1000.0,
    }
    return Demand(**(facts | given))


@pytest.mark.parametrize(
    ("given", "decision"),
    [
        ({"waiting": 1}, Decision(1, 2)),
        ({"waiting": 35}, Decision(4, 2)),
        ({"waiting": 900}, Decision(4, 2)),
        ({"target": 1, "in_flight": 11}, Decision(2, 2)),
        ({"target": 1, "last_used": 939}, Decision(0, 3)),
        ({"target": 1, "last_used": 941}, Decision(1, 5)),
        ({"target": 1, "last_used": 0, "in_flight": 1}, Decision(1, 5)),
        ({"target": 1, "last_used": 0, "waiting": 1}, Decision(1, 5)),
        ({"target": 3, "in_flight": 5, "low_since": 900}, Decision(1, 4)),
        ({"target": 3, "in_flight": 15, "low_since": 900}, Decision(2, 4)),
        ({"target": 3, "in_flight": 5, "low_since": 990}, Decision(3, 5)),
        ({"target": 9}, Decision(4, 5)),
        ({}, Decision(0, 5)),
    ],
)
def test_steps(given: dict[str, Any], decision: Decision) -> None:
    assert decide(LIMITS, demand(**given)) == decision


def test_min_replicas_stay() -> None:
    limits = Limits(min_replicas=2, max_replicas=4, target_ongoing_requests=10, idle_timeout=60)
    assert decide(limits, demand()) == Decision(2, 2)
    assert decide(limits, demand(target=4, last_used=0)) == Decision(2, 3)


def test_after_a_failure_only_new_waiters_start_it_again() -> None:
    failed = Failure(count=1, cause="no", at=1000)
    assert decide(LIMITS, demand(now=1000.5, target=1, waiting=3, failure=failed)) == Decision(0, 1)
    assert decide(LIMITS, demand(now=1002, waiting=1, failure=failed)) == Decision(1, 2)
    warm = Limits(min_replicas=1, max_replicas=1, target_ongoing_requests=10, idle_timeout=60)
    assert decide(warm, demand(now=1002, failure=failed)) == Decision(0, 1)
    assert decide(warm, demand(now=1006, failure=failed)) == Decision(1, 2)


def test_a_failed_growth_leaves_what_is_ready_alone() -> None:
    failed = Failure(count=5, cause="no", at=1000)
    assert decide(LIMITS, demand(now=1001, target=2, ready=1, in_flight=15, failure=failed)) == Decision(1, 1)


def test_after_three_failures_in_a_row_callers_are_refused_while_the_pause_lasts() -> None:
    failed = Failure(count=3, cause="no", at=1000)
    assert failed.refuses(1019) and not failed.refuses(1021)
    assert decide(LIMITS, demand(now=1019, waiting=1, failure=failed)) == Decision(0, 1)
    assert decide(LIMITS, demand(now=1021, waiting=1, failure=failed)) == Decision(1, 2)
    assert Failure(count=50, cause="no", at=0).paused(299)
    assert not Failure(count=50, cause="no", at=0).paused(301)
