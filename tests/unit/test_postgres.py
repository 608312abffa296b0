"""Control's database in a real PostgreSQL: what it stores, and what happens when the server dies or hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import SQLAlchemyError

from llmrun.errors import BackupError
from llmrun.settings import Settings
from llmrun.wire import ColdStart, KeyInfo
from llmrun_runtime.cluster import backup as home_backup
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.state import backup as backup_module
from llmrun_runtime.control.state import database_thread
from llmrun_runtime.control.state.connection import describe_error
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.database_thread import DatabaseTimeout
from llmrun_runtime.control.state.tables import AppRow, Base, CountedRow
from tests.support.postgres import Postgres, running_postgres
from tests.unit.test_backup import PACKAGE, contents, fill


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def database(server: Postgres) -> Iterator[Database]:
    """Control's database without any table."""
    database = Database(server.url)
    Base.metadata.drop_all(database._engine)
    yield database
    database.close()


async def longest_pause(stop: asyncio.Event) -> float:
    """Return for how long the event loop did nothing else, in seconds."""
    longest = 0.0
    while not stop.is_set():
        started = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - started)
    return longest


def test_everything_that_control_stores_is_read_again(database: Database, server: Postgres) -> None:
    fill(database)
    again = Database(server.url)
    assert contents(again) == contents(database) and all(contents(again).values())
    assert again.load() == database.load() and again.load()[0].keys() == {"one"}
    assert again.cluster_id() == database.cluster_id()
    assert again.package("p") == PACKAGE
    assert [start.asked for start in again.cold_starts("one")] == [2.5, 1.5]
    keys = Keys(again)
    keys.load()
    assert [key.rpm for key in keys.rows()] == [5]
    again.remove(["one"])
    assert again.load() == ({}, {}) and again.reserve_version("one") == 2
    again.close()


def test_a_backup_moves_from_sqlite_to_postgresql_and_back(
    database: Database, server: Postgres, tmp_path: Path
) -> None:
    first, moved, back = (
        Settings(home=tmp_path / "first"),
        Settings(home=tmp_path / "moved", database_url=server.url),
        Settings(home=tmp_path / "back"),
    )
    first.make_home()
    sqlite = Database(first.resolved_database_url())
    fill(sqlite)
    home_backup.back_up(first, tmp_path / "1.zip", force=False)
    home_backup.restore(moved, tmp_path / "1.zip", force=False)
    assert contents(database) == contents(sqlite)
    database.put_cold_start(ColdStart(model="one", version=1, node="n", forked=True, asked=3, parts={}))
    Keys(database).create(KeyInfo(name="new"))
    after = contents(database)
    home_backup.back_up(moved, tmp_path / "2.zip", force=False)
    with pytest.raises(BackupError, match=r"is not empty \(models: 1, API keys: 2\)"):
        home_backup.restore(moved, tmp_path / "1.zip", force=False)
    home_backup.restore(back, tmp_path / "2.zip", force=False)
    sqlite.close()
    sqlite = Database(back.resolved_database_url())
    assert contents(sqlite) == after
    sqlite.close()
    home_backup.restore(moved, tmp_path / "1.zip", force=True)
    assert [key["name"] for key in contents(database)["keys"]] == ["ci"]
    assert moved.admin_key_file.read_text() == first.admin_key_file.read_text() == back.admin_key_file.read_text()


def test_a_restore_that_fails_changes_nothing(
    database: Database, server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Settings(home=tmp_path / "home", database_url=server.url)
    fill(database)
    home_backup.back_up(home, tmp_path / "backup.zip", force=False)
    database.put_app("app", "later")
    before = contents(database)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup_module, "run_migrations", fail)
    with pytest.raises(OSError, match="No space left"):
        home_backup.restore(home, tmp_path / "backup.zip", force=True)
    assert contents(database) == before


def test_a_backup_is_of_one_moment_while_control_writes(
    database: Database, server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, copy = Settings(home=tmp_path / "home", database_url=server.url), Settings(home=tmp_path / "copy")
    fill(database)
    before, write_table = contents(database), backup_module._write_table
    written = 0

    def between_tables(*args: Any) -> None:
        nonlocal written
        written += 1
        with database.session() as session, session.begin():
            session.add(AppRow(name=f"app-{written}", source=""))
            session.add(CountedRow(replica=f"app-{written}", counts="[]"))
        write_table(*args)

    monkeypatch.setattr(backup_module, "_write_table", between_tables)
    home_backup.back_up(home, tmp_path / "backup.zip", force=False)
    assert len(contents(database)["apps"]) == len(before["apps"]) + len(before)
    home_backup.restore(copy, tmp_path / "backup.zip", force=False)
    restored = Database(copy.resolved_database_url())
    assert contents(restored) == before
    restored.close()


async def test_calls_fail_while_the_server_is_down_and_work_again_after_it(
    database: Database, server: Postgres
) -> None:
    await database.run(database.put_app, "app", "before")
    server.kill()
    try:
        stop = asyncio.Event()
        pause = asyncio.ensure_future(longest_pause(stop))
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(SQLAlchemyError) as caught:
                await database.run(database.put_app, "app", "lost")
            assert time.monotonic() - started < 5
            text = describe_error(caught.value)
            assert "Connection refused. Check LLMRUN_DATABASE_URL" in text and "\n" not in text
        stop.set()
        assert await pause < 2, "a call that waits for its connection would block the loop for 5 s"
    finally:
        server.start()
    assert await database.run(database.load) == ({}, {"app": "before"})
    await database.run(database.put_app, "app", "after")
    assert await database.run(database.load) == ({}, {"app": "after"})


async def test_a_server_that_hangs_delays_nothing_but_its_own_calls(
    database: Database, server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_thread, "CALL_TIMEOUT_S", 1.0)
    await database.run(database.put_app, "app", "before")
    stop = asyncio.Event()
    pause = asyncio.ensure_future(longest_pause(stop))
    with server.frozen():
        for source in ("started", "queued"):
            started = time.monotonic()
            with pytest.raises(DatabaseTimeout, match="no response within 1 s"):
                await database.run(database.put_app, "app", source)
            assert time.monotonic() - started < 2
        database.submit(database.put_app, "app", "in the background")
        stop.set()
        assert await pause < 0.5
    monkeypatch.setattr(database_thread, "CALL_TIMEOUT_S", 15.0)
    assert await database.run(database.load) == ({}, {"app": "in the background"})
