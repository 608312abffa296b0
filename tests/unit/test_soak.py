"""The soak's judgement: which outcomes a kill explains, and what falls short."""

from __future__ import annotations

import pytest

from tests.soak.ledger import Kill, Kind, Ledger, Outcome


@pytest.mark.parametrize(
    ("kind", "kill", "explained"),
    [
        ("broken", Kill("engine core", 5, "one"), True),
        ("broken", Kill("engine core", 5, "two"), False),  # another model's engine
        ("broken", Kill("engine core", 11, "one"), False),  # after the request had ended
        ("broken", Kill("engine core", -30, "one"), False),  # long before
        ("broken", Kill("control", 5), False),  # it carries no request
        ("broken", Kill("ingress", 5), True),
        ("unreachable", Kill("engine core", 5, "one"), False),  # the ingress answers for it
        ("unreachable", Kill("cluster", 5), True),
    ],
)
def test_only_a_kill_of_what_carries_a_request_explains_its_end(kind: Kind, kill: Kill, explained: bool) -> None:
    ledger = Ledger([Outcome(kind, "one", 1, 10), Outcome("answered", "one", 1, 2)], [kill])
    assert bool(ledger.explanation(ledger.outcomes[0])) == explained
    assert bool(ledger.shortcomings()) != explained


def test_a_lost_request_falls_short_whatever_was_killed() -> None:
    ledger = Ledger([Outcome("answered", "one", 1, 2), Outcome("lost", "one", 1, 10, "silence")], [Kill("cluster", 5)])
    assert ledger.shortcomings() == ["lost after 9.0 s, of one: silence"]
    assert Ledger().shortcomings() == ["no request was answered"]
