"""A database that is locked, away or not the right one: what control does meanwhile."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from llmrun.errors import ClusterError
from llmrun.settings import Settings
from llmrun_runtime import ray_internals
from llmrun_runtime.control import database_check
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.control_plane import ControlPlane
from llmrun_runtime.control.database_check import check_database, find_mismatch
from llmrun_runtime.control.state import database_thread
from llmrun_runtime.control.state.connection import describe_error
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.database_thread import DatabaseThread, DatabaseTimeout
from tests.support import factories


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a SQLite file."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.rollback()


@pytest.fixture
def cluster_values(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The values that live as long as the Ray cluster."""
    values: dict[str, str] = {}
    monkeypatch.setattr(ray_internals, "read_cluster_value", values.get)
    monkeypatch.setattr(ray_internals, "write_cluster_value", values.__setitem__)
    return values


async def test_a_locked_database_delays_no_report_and_no_routing_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster_values: dict[str, str]
) -> None:
    async def no_applications(_: ServeApps) -> list[tuple[str, int]]:
        return []

    async def serve(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(ServeApps, "load", no_applications)
    monkeypatch.setattr("llmrun_runtime.http.serve", serve)
    monkeypatch.setattr("llmrun_runtime.control.control_plane.prestart", lambda *_: None)
    monkeypatch.setattr("llmrun_runtime.control.actor.keep_ingresses", serve)
    control = await factories.make_control(tmp_path)
    await control.start()
    plane = control._plane
    plane.database.put_version(factories.deployed(factories.spec(), proven=False), active=True)
    plane.autoscaler.activate(factories.deployed(factories.spec(), proven=False))
    try:
        with locked(tmp_path / "llmrun.db"):
            plane.cold_starts.begin("one", 1, time.time())
            slowest = 0.0
            for number in range(40):  # the first one proves the model and completes a cold start: both are stored
                started = time.monotonic()
                await control.report(factories.report(usage=(("", "", number, 1, 1, 0),)))
                await control.demand("ingress", {}, {"r1": time.time()}, {})
                table = await control.watch("", 0, 5)
                slowest = max(slowest, time.monotonic() - started)
                await asyncio.sleep(0.05)
            assert slowest < 0.5
            assert [route.id for route in table.models["one"].replicas] == ["r1"]
            assert not plane.database.load()[0]["one"].proven  # still not written
        async with asyncio.timeout(20):
            while not plane.database.load()[0]["one"].proven or not plane.cold_starts.history("one"):
                await asyncio.sleep(0.05)
    finally:
        for task in control._running:
            task.cancel()
        await asyncio.gather(*control._running, return_exceptions=True)
        control._socket.close()
        plane.database.close()


async def test_a_call_that_nobody_waits_for_any_more_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'llmrun.db'}")
    assert await database.run(database.load) == ({}, {})
    with locked(tmp_path / "llmrun.db"), monkeypatch.context() as patch:
        patch.setattr(database_thread, "CALL_TIMEOUT_S", 0.2)
        for source in ("started", "queued"):
            with pytest.raises(DatabaseTimeout, match=r"no response within 0\.2 s"):
                await database.run(database.put_app, "app", source)
    await database.run(database.cluster_id)
    assert database.load() == ({}, {})
    database.put_app("app", "later")
    assert database.load() == ({}, {"app": "later"})
    database.close()


async def test_work_is_done_in_order_and_a_hung_database_has_a_short_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_thread, "MAX_PENDING", 50)
    database, done = Database(f"sqlite:///{tmp_path / 'llmrun.db'}"), list[int]()
    started, hang = threading.Event(), threading.Event()

    def hang_on() -> None:
        started.set()
        hang.wait(10)

    database.submit(hang_on)
    await asyncio.to_thread(started.wait, 10)
    for number in range(1000):
        database.submit(done.append, number)
    with pytest.raises(DatabaseTimeout, match="50 calls wait"):
        await database.run(database.load)
    hang.set()
    await asyncio.to_thread(database.close)
    assert done == list(range(50))


def test_a_database_that_does_not_know_what_runs_is_refused() -> None:
    def mismatch(stored: str = "a", recorded: str | None = "a", last: int = 2) -> str:
        return find_mismatch("sqlite:///llmrun.db", stored, recorded, [("one", 2)], {"one": last})

    assert not mismatch() and not mismatch(last=9) and not mismatch(recorded=None)
    assert mismatch(stored="b").startswith("sqlite:///llmrun.db is not the database of the running models.")
    assert "it does not know one v2. The running models stay as they are. Restore" in mismatch(last=1)
    assert not find_mismatch("", "b", "a", [], {})  # nothing runs: the models were moved here


async def test_control_deletes_nothing_with_another_or_an_old_database(
    tmp_path: Path, cluster_values: dict[str, str]
) -> None:
    first, other = (Database(f"sqlite:///{tmp_path / name}.db") for name in ("first", "other"))
    assert first.reserve_version("one") == 1  # a proof runs, and nothing else is stored
    await check_database(first, [])
    assert cluster_values == {database_check.CLUSTER_ID: first.cluster_id()}
    await check_database(first, [("one", 1)])
    with pytest.raises(ClusterError, match="older than the running models"):
        await check_database(first, [("one", 1), ("lost", 1)])
    other.reserve_version("one")
    with pytest.raises(ClusterError, match="not the database of the running models"):
        await check_database(other, [("one", 1)])
    assert cluster_values == {database_check.CLUSTER_ID: first.cluster_id()}
    await check_database(other, [])
    assert cluster_values == {database_check.CLUSTER_ID: other.cluster_id()}
    for database in (first, other):
        database.close()


async def test_control_refuses_to_start_with_an_empty_database_until_it_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster_values: dict[str, str]
) -> None:
    deleted: list[tuple[str, int]] = []

    async def running(_: ServeApps) -> list[tuple[str, int]]:
        return [("one", 1), ("one", 2)]

    async def delete(_: ServeApps, model: str, version: int) -> None:
        deleted.append((model, version))

    monkeypatch.setattr(ServeApps, "load", running)
    monkeypatch.setattr(ServeApps, "delete", delete)
    good = Database(f"sqlite:///{tmp_path / 'good.db'}")
    assert [good.reserve_version("one"), good.reserve_version("one")] == [1, 2]
    good.put_version(factories.deployed(factories.spec()), active=True)
    await check_database(good, [])
    good.close()
    plane = ControlPlane(Settings(home=tmp_path), "http://127.0.0.1:8000", ("127.0.0.1", 1))
    with pytest.raises(ClusterError, match="is not the database of the running models"):
        await plane.load()
    assert not deleted
    await plane.database.run(plane.database.disconnect)
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"llmrun.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "good.db").rename(tmp_path / "llmrun.db")
    await plane.load()
    assert deleted == [("one", 2)] and plane.models.deployed.keys() == {"one"}
    plane.database.close()


async def test_a_database_error_is_raised_to_the_caller(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'missing' / 'llmrun.db'}")
    with pytest.raises(OperationalError, match="unable to open"):
        await database.run(database.load)
    database.close()


async def test_a_timeout_says_why_the_call_before_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread: work behind a statement that waits for a lock never gets to its own error."""
    monkeypatch.setattr(database_thread, "CALL_TIMEOUT_S", 0.3)
    thread, release = DatabaseThread(), threading.Event()

    def wait_for_lock() -> None:
        time.sleep(0.1)
        raise OperationalError("INSERT", {}, Exception("database is locked"))

    try:
        thread.submit(wait_for_lock)
        thread.submit(lambda: None)  # reads succeed meanwhile
        thread.submit(release.wait)
        with pytest.raises(DatabaseTimeout) as raised:
            await thread.run(lambda: None)
        assert "another process has locked it" in describe_error(raised.value)
        release.set()
        assert await thread.run(lambda: 1) == 1
        release.clear()
        await asyncio.sleep(0.3)  # long ago
        thread.submit(release.wait)
        with pytest.raises(DatabaseTimeout) as raised:
            await thread.run(lambda: None)
        assert "locked" not in describe_error(raised.value)
    finally:
        release.set()
        thread.close()
