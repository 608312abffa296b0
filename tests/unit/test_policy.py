"""The autoscaling policy, with a fake clock."""

from __future__ import annotations

from typing import Any

import pytest

from llmrun_runtime.control.autoscaling.policy import Decision, Demand, Failure, ScalingLimits, decide

LIMITS = ScalingLimits(min_replicas=0, max_replicas=4, target_ongoing_requests=10, idle_timeout=60)


def demand(**fields: Any) -> Demand:
    """Return the demand of an idle model that was last used now, at t=1000, with these fields."""
    defaults: dict[str, Any] = {
        "now": 1000.0,
        "target": 0,
        "ready": 0,
        "waiting": 0,
        "in_flight": 0,
        "last_used": 1000.0,
        "low_since": 1000.0,
    }
    return Demand(**(defaults | fields))


@pytest.mark.parametrize(
    ("fields", "decision"),
    [
        ({"waiting": 1}, Decision(1, 3)),
        ({"waiting": 35}, Decision(4, 3)),
        ({"waiting": 900}, Decision(4, 3)),
        ({"target": 1, "in_flight": 11}, Decision(2, 3)),
        ({"target": 1, "last_used": 939}, Decision(0, 6)),
        ({"target": 1, "last_used": 941}, Decision(1, 8)),
        ({"target": 1, "last_used": 0, "in_flight": 1}, Decision(1, 8)),
        ({"target": 1, "last_used": 0, "waiting": 1}, Decision(1, 8)),
        ({"target": 3, "in_flight": 5, "low_since": 900}, Decision(1, 7)),
        ({"target": 3, "in_flight": 15, "low_since": 900}, Decision(2, 7)),
        ({"target": 3, "in_flight": 5, "low_since": 990}, Decision(3, 8)),
        ({"target": 9}, Decision(4, 8)),
        ({}, Decision(0, 8)),
        ({"target": 1, "pending": True}, Decision(0, 5)),
        ({"target": 1, "pending": True, "placed": 1}, Decision(1, 8)),
        ({"target": 4, "pending": True, "placed": 2}, Decision(2, 5)),
        ({"target": 1, "pending": True, "waiting": 1}, Decision(1, 8)),
        ({"target": 1, "placed": 0}, Decision(1, 8)),  # it was killed: Serve restarts it
        ({"target": 2, "ready": 2, "in_flight": 3, "unloaded": True}, Decision(0, 2)),
        ({"waiting": 1, "unloaded": True}, Decision(1, 3)),
    ],
)
def test_decisions(fields: dict[str, Any], decision: Decision) -> None:
    assert decide(LIMITS, demand(**fields)) == decision


def test_min_replicas_keep_running() -> None:
    limits = ScalingLimits(min_replicas=2, max_replicas=4, target_ongoing_requests=10, idle_timeout=60)
    assert decide(limits, demand()) == Decision(2, 3)
    assert decide(limits, demand(target=4, last_used=0)) == Decision(2, 6)


def test_after_a_failure_only_new_requests_start_it_again() -> None:
    failed = Failure(count=1, cause="no", at=1000)
    assert decide(LIMITS, demand(now=1000.5, target=1, waiting=3, failure=failed)) == Decision(0, 1)
    assert decide(LIMITS, demand(now=1002, waiting=1, failure=failed)) == Decision(1, 3)
    warm = ScalingLimits(min_replicas=1, max_replicas=1, target_ongoing_requests=10, idle_timeout=60)
    assert decide(warm, demand(now=1002, failure=failed)) == Decision(0, 1)
    assert decide(warm, demand(now=1006, failure=failed)) == Decision(1, 3)


def test_a_failed_scale_up_keeps_ready_replicas() -> None:
    failed = Failure(count=5, cause="no", at=1000)
    assert decide(LIMITS, demand(now=1001, target=2, ready=1, in_flight=15, failure=failed)) == Decision(1, 1)


def test_after_three_failures_requests_are_refused_during_the_back_off() -> None:
    failed = Failure(count=3, cause="no", at=1000)
    assert failed.refuses(1019) and not failed.refuses(1021)
    assert decide(LIMITS, demand(now=1019, waiting=1, failure=failed)) == Decision(0, 1)
    assert decide(LIMITS, demand(now=1021, waiting=1, failure=failed)) == Decision(1, 3)
    assert Failure(count=50, cause="no", at=0).backs_off(1799)
    assert not Failure(count=50, cause="no", at=0).backs_off(1801)


def test_after_three_failures_it_retries_when_the_back_off_ends() -> None:
    failed = Failure(count=3, cause="no", at=1000)
    assert decide(LIMITS, demand(now=1019, failure=failed)) == Decision(0, 1)
    assert decide(LIMITS, demand(now=1021, failure=failed)) == Decision(1, 4)
    assert decide(LIMITS, demand(now=1021, failure=Failure(count=2, cause="no", at=1000))) == Decision(0, 8)


def test_a_model_may_fail_for_ever() -> None:
    failure = Failure(10**6, "no weights", at=1000)
    assert failure.refuses(1000 + 1799) and not failure.refuses(1000 + 1800)
