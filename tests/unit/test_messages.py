"""Messages between processes of different releases."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from typing import Any

import pytest

from llmrun_runtime.wire import reports, routing_table
from llmrun_runtime.wire.message import Message
from llmrun_runtime.wire.reports import ReplicaReport, Traffic
from llmrun_runtime.wire.routing_table import ModelRoute, ReplicaRoute, Table
from tests.support import factories


def from_release(message: Any, *, without: tuple[str, ...] = (), **later: Any) -> Any:
    """Return the message as read from a release without some fields, and with others."""
    sent = pickle.loads(pickle.dumps(message))
    for name in without:
        del sent.__dict__[name]
    sent.__dict__.update(later)
    return pickle.loads(pickle.dumps(sent))


def test_every_message_can_be_read_by_another_release() -> None:
    for module in (reports, routing_table):
        classes = [kind for _, kind in inspect.getmembers(module, dataclasses.is_dataclass)]
        assert classes and all(isinstance(kind, type) and issubclass(kind, Message) for kind in classes)


def test_fields_of_other_releases_get_defaults_or_are_dropped() -> None:
    report = factories.report(in_flight=3, moments={"placed": 1.0})
    old = from_release(report, without=("moments", "paces"), later="x")
    assert isinstance(old, ReplicaReport) and (old.in_flight, old.moments, old.paces) == (3, {}, ())
    assert "later" not in vars(old) and from_release(report, later=1) == report
    assert from_release(Traffic(2, 1), without=("priority",)) == Traffic(2, 1)
    replica = ReplicaRoute("r", "h", 1, "t")
    model = ModelRoute("one", "app", 1, "hot", 0, ("one",), frozenset(), 4, (from_release(replica, later=1),))
    table = Table("e", 1, {"one": from_release(model, without=("max_queued",), later=1)})
    assert from_release(table, without=("admin",), later=1) == Table("e", 1, {"one": model})
    assert table.models["one"].max_queued == 1000 and table.models["one"].replicas == (replica,)


def test_a_missing_field_without_a_default_is_named() -> None:
    with pytest.raises(TypeError, match="ReplicaReport of another release lacks the field 'token'"):
        from_release(factories.report(), without=("token",))
