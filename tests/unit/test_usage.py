"""Control's API keys and usage, with a real SQLite file and restarts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from llmrun.errors import Refused
from llmrun.identity import digest_of
from llmrun.wire import KeyInfo, UsageLine
from llmrun_runtime.control import usage as usage_module
from llmrun_runtime.control.control_plane import ControlPlane
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Candidate, Models
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.control.usage import Usage
from llmrun_runtime.engines.shim import usage_meter
from llmrun_runtime.placement import Placement
from llmrun_runtime.wire.reports import ReplicaReport
from llmrun_runtime.wire.usage import Row
from tests.support import factories


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(f"sqlite:///{tmp_path / 'test.db'}")


def report(*usage: Row, replica: str = "r1") -> ReplicaReport:
    """Return a replica's report with these rows."""
    return factories.report(replica=replica, usage=usage)


def test_a_key_is_shown_once_and_only_its_hash_is_stored(database: Database, tmp_path: Path) -> None:
    keys, changes = Keys(database), []
    keys.on_change = lambda: changes.append(1)
    created = keys.create(KeyInfo(name="ci", models=("one",), rpm=5, wake=False))
    assert created.key.startswith("sk-llmrun-") and len(created.key) > 50
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("test.db*"))
    assert b'"rpm":5' in stored and created.key.encode() not in stored
    again = Keys(database)
    again.load()
    route = again.routes[digest_of(created.key)]
    assert (route.name, route.models, route.rpm, route.wake) == ("ci", ("one",), 5, False)
    assert again.rows() == [created.facts] and abs(created.facts.created - time.time()) < 10
    with pytest.raises(Refused, match="key 'ci' already exists"):
        keys.create(KeyInfo(name="ci"))
    with pytest.raises(Refused, match="its expiry is in the past"):
        keys.create(KeyInfo(name="late", expires=time.time() - 1))
    with pytest.raises(Refused, match="key 'other' not found; available: ci"):
        keys.revoke("other")
    keys.revoke("ci")
    assert keys.routes == {} and len(changes) == 2
    again.load()
    assert Keys(database).rows() == []


async def test_usage_of_replicas_is_added_up_once(database: Database) -> None:
    first = Usage(database)
    first.report(report(("a", "", 1, 10, 5, 0), ("b", "sql", 1, 3, 3, 2)), 1000)
    first.report(report(("a", "", 2, 20, 11, 8)), 1001)
    await first.flush()
    second = Usage(database)  # control was restarted
    second.load()
    second.report(report(("a", "", 3, 30, 20, 8)), 1002)
    second.report(report(("a", "", 1, 7, 7, 0), replica="r2"), 1003)
    second.report(report(("a", "", 1, 1, 1, 0)), 1004)  # the first replica restarted its engine
    second.add_gpu_seconds("one", 2, 1.5)
    await second.flush()
    (both,) = second.lines(["model"], "0000-00-00")
    assert both == UsageLine(
        model="one", requests=6, prompt_tokens=41, completion_tokens=31, cached_tokens=10, gpu_seconds=3
    )
    by_key = {(line.key, line.adapter): line.requests for line in second.lines(["key", "adapter"], "0000-00-00")}
    assert by_key == {("", ""): 0, ("a", ""): 5, ("b", "sql"): 1}
    assert second.lines(["day"], "9999-01-01") == []


async def test_old_days_are_merged_into_the_first_of_their_month(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = ""
    monkeypatch.setattr(usage_module, "_today", lambda: today)
    usage = Usage(database)
    monkeypatch.setattr(usage, "_next_merge", float("inf"))
    days = ("2024-10-31", "2024-11-01", "2024-11-02", "2024-11-21", "2024-11-22")
    for requests, today in enumerate(days, start=1):  # noqa: B007 - read above
        usage.report(report(("a", "sql", requests, requests, 0, 0)), 1000)
        usage.add_gpu_seconds("one", 1, 0.5)
        await usage.flush()
    today = "2025-12-26"  # 400 days after 2024-11-21
    monkeypatch.setattr(usage, "_next_merge", 0)
    await usage.flush()
    await usage.flush()
    lines = usage.lines(["day", "key", "model", "adapter"], "0000-00-00")
    assert {(line.day, line.requests, line.prompt_tokens) for line in lines if line.key} == {
        ("2024-10-01", 1, 1),
        ("2024-11-01", 2, 2),
        ("2024-11-21", 1, 1),
        ("2024-11-22", 1, 1),
    }
    assert {line.day: line.gpu_seconds for line in lines if not line.key}["2024-11-01"] == 1
    assert len(lines) == 8 and {line.model for line in lines} == {"one"}


async def test_tokens_of_the_last_minute(database: Database) -> None:
    usage = Usage(database)
    usage.report(report(("a", "", 1, 10, 5, 0)), 1000)
    usage.report(report(("a", "", 2, 15, 10, 0)), 1030)
    assert usage.tokens("key:a", 20, 1031) == (25, 29)
    assert usage.tokens("model:one", 100, 1031) == (25, 0)
    assert usage.tokens("key:a", 20, 1061) == (10, 0) and usage.tokens("key:b", 1, 1061) == (0, 0)


async def test_usage_that_cannot_be_stored_is_stored_later(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = Usage(database)
    usage.report(report(("a", "", 1, 10, 5, 0)), 1000)
    store = Usage._store

    def fail(*_: object) -> None:
        raise OperationalError("insert", {}, Exception("the disk is full"))

    monkeypatch.setattr(usage_module.Usage, "_store", fail)
    await usage.flush()
    usage.report(report(("a", "", 2, 20, 10, 0)), 1001)
    usage.forget("r1")
    monkeypatch.setattr(usage_module.Usage, "_store", store)
    await usage.flush()
    (line,) = usage.lines(["key"], "0000-00-00")
    assert (line.requests, line.prompt_tokens, line.completion_tokens) == (2, 20, 10)
    again = Usage(database)
    again.load()
    assert again._counted == {}


def test_a_request_is_counted_once_however_many_prompts_it_has() -> None:
    before = dict.fromkeys(usage_meter._counts)
    with usage_meter.metered("many"):
        request = usage_meter.current()
        assert request
        request.record("", prompt=3, completion=1, cached=2)
        request.record("", prompt=4)
        request.record("", completion=5)
    assert usage_meter.current() is None
    assert [row for row in usage_meter.snapshot()["usage"] if row[:2] not in before] == [("many", "", 1, 7, 6, 2)]


def test_a_snapshot_has_only_the_rows_that_changed_after_an_earlier_one() -> None:
    with usage_meter.metered("since"):
        request = usage_meter.current()
    assert request
    request.record("x", prompt=1)
    request.record("y", prompt=1)
    number = usage_meter.snapshot()["number"]
    assert usage_meter.snapshot(number)["usage"] == []
    request.record("x", prompt=2)
    changed = [("since", "x", 1, 3, 0, 0)]
    assert usage_meter.snapshot(number)["usage"] == changed == usage_meter.snapshot(number)["usage"], "a lost response"


def test_replicas_of_proofs_and_of_deleted_models_are_live() -> None:
    models, registry = Models(), Registry()
    models.put(factories.deployed(factories.spec("one"), placement=Placement(1, 1)))
    proof = replace(factories.deployed(factories.spec("one"), placement=Placement(1, 4)), version=2, engine_version=2)
    models.candidates["one"] = Candidate(proof)
    for replica, model, version in (("r1", "one", 1), ("r2", "one", 2), ("r3", "deleted", 1)):
        registry.report(factories.report(replica=replica, model=model, version=version), 0)
    plane: Any = SimpleNamespace(models=models, registry=registry)
    assert ControlPlane.live_replicas(plane) == [("r1", "one", 1), ("r2", "one", 4), ("r3", "deleted", 0)]
