"""`llmrun backup` and `llmrun restore`, without a cluster."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import threading
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

import llmrun
from llmrun.errors import BackupError
from llmrun.identity import digest_of
from llmrun.settings import Settings
from llmrun.wire import ColdStart, KeyInfo
from llmrun_runtime.cluster import backup as home_backup
from llmrun_runtime.cluster.cluster_file import ClusterFile
from llmrun_runtime.cluster.local import lock_home
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.state import backup as backup_module
from llmrun_runtime.control.state import migrations
from llmrun_runtime.control.state.backup import MANIFEST, open_backup, write_backup
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.tables import AdaptersRow, AppRow, Base, CountedRow, UsageRow
from llmrun_runtime.weights.pin import File, Pin
from tests.support import factories
from tests.support.cluster import Home
from tests.unit.test_database import FIRST_RELEASE, execute, rows

PACKAGE = random.Random(1).randbytes(50_000)


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def fill(database: Database) -> str:
    """Put at least one row in every table; return an API key."""
    deployed = factories.deployed(factories.spec(code={"package": "p", "file": "app.py", "cls": "One"}))
    pin = Pin(weights=deployed.spec.model, revision="1", files=(File(name="config.json", size=2),))
    deployed = replace(deployed, pin=pin)
    database.reserve_version("deleted")
    database.put_app("app", "host:/app.py — ünïcode\n")
    database.put_package("p", PACKAGE)
    database.put_package("q", b"")
    database.put_version(deployed, active=True)
    for asked in (1.5, 2.5):
        database.put_cold_start(ColdStart(model="one", version=1, node="n", forked=False, asked=asked, parts={}))
    with database.session() as session, session.begin():
        session.add(AdaptersRow(model="one", lora="{}", adapters="[]"))
        session.add(UsageRow(day="2026-11-01", key="ci", model="one", adapter="", requests=2**40, gpu_seconds=0.1))
        session.add(UsageRow(day="2026-11-02", key="", model="one", adapter="a", prompt_tokens=3))
        session.add(CountedRow(replica="r", counts="[]"))
    return Keys(database).create(KeyInfo(name="ci", rpm=5)).key


def contents(database: Database) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables."""
    with database.session() as session:
        return {
            table.name: [
                dict(row) for row in session.execute(select(table).order_by(*table.primary_key.columns)).mappings()
            ]
            for table in Base.metadata.sorted_tables
        }


@pytest.fixture
def full(tmp_path: Path) -> Settings:
    """A home with models, keys and usage."""
    settings = Settings(home=tmp_path / "full")
    settings.make_home()
    database = Database(settings.resolved_database_url())
    fill(database)
    database.close()
    return settings


@pytest.fixture
def empty(tmp_path: Path) -> Settings:
    """A home that does not exist yet."""
    return Settings(home=tmp_path / "empty")


@pytest.fixture
def archive(full: Settings, tmp_path: Path) -> Path:
    """A backup of `full`."""
    path = tmp_path / "backup.zip"
    home_backup.back_up(full, path, force=False)
    return path


def read(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    database = Database(settings.resolved_database_url())
    found = contents(database)
    database.close()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(archive: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an archive's manifest."""
    with zipfile.ZipFile(archive) as old:
        members = {name: old.read(name) for name in old.namelist()}
    manifest = json.loads(members[MANIFEST])
    change(manifest)
    members[MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(archive, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)


def test_every_row_and_the_admin_key_are_restored(full: Settings, empty: Settings, archive: Path) -> None:
    assert archive.stat().st_mode & 0o777 == 0o600
    with zipfile.ZipFile(archive) as opened:
        manifest = json.loads(opened.read(MANIFEST))
    before = read(full)
    assert all(before.values())
    assert manifest["rows"] == {name: len(table) for name, table in before.items()}
    assert manifest["llmrun"] == llmrun.__version__ and manifest["schema_version"] == len(migrations.MIGRATIONS)
    restored = home_backup.restore(empty, archive, force=False)
    assert restored.rows == manifest["rows"]
    assert not list(empty.root.glob("llmrun.db-*")) and not list(empty.root.glob(".*"))
    for path in (empty.admin_key_file, empty.root / "llmrun.db"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert empty.admin_key_file.read_text() == full.admin_key_file.read_text()
    assert read(empty) == before


def test_a_restored_database_is_usable(empty: Settings, tmp_path: Path) -> None:
    source = Database(url(tmp_path / "source.db"))
    key = fill(source)
    write_backup(source.url, tmp_path / "no.key", tmp_path / "backup.zip")
    home_backup.restore(empty, tmp_path / "backup.zip", force=False)
    database = Database(empty.resolved_database_url())
    assert database.load() == source.load() and database.cluster_id() == source.cluster_id()
    keys = Keys(database)
    keys.load()
    assert keys.routes[digest_of(key)].rpm == 5
    assert database.package("p") == PACKAGE and database.package("q") == b""
    assert database.reserve_version("deleted") == 2
    database.put_cold_start(ColdStart(model="one", version=1, node="n", forked=True, asked=3, parts={}))
    assert [start.asked for start in database.cold_starts("one")] == [3, 2.5, 1.5]
    assert (empty.root / "admin.key").exists()  # a new one: the archive has none
    source.close()
    database.close()


def test_a_backup_is_of_one_moment_while_control_writes(
    full: Settings, empty: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer commits an app and a key together, between any two tables."""
    database = Database(full.resolved_database_url())
    write_table = backup_module._write_table
    written = 0

    def between_tables(*args: Any) -> None:
        nonlocal written
        with database.session() as session, session.begin():
            written += 1
            session.add(AppRow(name=f"app-{written}", source=""))
            session.add(CountedRow(replica=f"app-{written}", counts="[]"))
        write_table(*args)

    monkeypatch.setattr(backup_module, "_write_table", between_tables)
    before = contents(database)
    home_backup.back_up(full, tmp_path / "backup.zip", force=False)
    assert written == len(before) and len(contents(database)["apps"]) == len(before["apps"]) + written
    database.close()
    home_backup.restore(empty, tmp_path / "backup.zip", force=False)
    assert read(empty) == before


def test_a_backup_succeeds_under_constant_writes(full: Settings, empty: Settings, tmp_path: Path) -> None:
    database, stop, wrote = Database(full.resolved_database_url()), threading.Event(), threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with database.session() as session, session.begin():
                session.merge(CountedRow(replica="r", counts=str(number)))
                session.merge(AppRow(name="app", source=str(number)))
            wrote.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert wrote.wait(10)
        for _ in range(5):
            home_backup.back_up(full, tmp_path / "backup.zip", force=True)
            home_backup.restore(empty, tmp_path / "backup.zip", force=True)
            found = read(empty)
            assert found["counted"][0]["counts"] == found["apps"][0]["source"]
    finally:
        stop.set()
        writer.join()
        database.close()


def test_a_backup_of_an_older_release_is_restored(
    empty: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.db"
    execute(path, FIRST_RELEASE + 'ALTER TABLE "usage" DROP COLUMN gpu_seconds;')
    execute(path, "INSERT INTO usage VALUES ('2026-11-01', 'ci', 'one', '', 1, 2, 3, 4)")
    manifest = write_backup(url(path), tmp_path / "no.key", tmp_path / "backup.zip")
    assert manifest.schema_version == 0 and "packages" not in manifest.rows
    steps = ((), ("UPDATE apps SET source = source || '!'",))
    monkeypatch.setattr(migrations, "MIGRATIONS", steps)
    monkeypatch.setattr(backup_module, "MIGRATIONS", steps)
    home_backup.restore(empty, tmp_path / "backup.zip", force=False)
    file = empty.root / "llmrun.db"
    assert rows(file, 'SELECT requests, cached_tokens, gpu_seconds FROM "usage"') == [(1, 4, 0.0)]
    assert rows(file, "SELECT source FROM apps") == [("host:/app.py!",)]
    assert rows(file, "SELECT value FROM meta WHERE key = 'schema_version'") == [("2",)]
    database = Database(empty.resolved_database_url())
    assert database.load()[0].keys() == {"one"} and database.cluster_id()
    database.close()
    assert not list(empty.root.glob("*.before-*"))


def test_every_changed_byte_is_noticed(full: Settings, empty: Settings, archive: Path, tmp_path: Path) -> None:
    """Except in the parts of a zip that nothing reads: then the content is the same."""
    good, changed = archive.read_bytes(), tmp_path / "changed.zip"
    with open_backup(archive) as backup:
        manifest = backup.manifest
    numbers = random.Random(0)
    places = [*numbers.sample(range(len(good)), 400), *range(len(good) - 400, len(good))]
    noticed = 0
    for place in places:
        data = bytearray(good)
        data[place] ^= numbers.randrange(1, 256)
        changed.write_bytes(data)
        try:
            with open_backup(changed) as backup:
                assert backup.manifest == manifest
        except BackupError as error:
            noticed += 1
            assert "\n" not in str(error)
    assert noticed > len(places) / 2
    data = bytearray(good)
    data[len(good) // 2] ^= 1  # inside the package
    changed.write_bytes(data)
    with pytest.raises(BackupError, match="is not a complete backup"):
        home_backup.restore(empty, changed, force=False)
    assert not empty.root.exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda manifest: manifest.update(format=2), "format 2"),
        (lambda manifest: manifest.update(schema_version=99), "schema version 99"),
        (lambda manifest: manifest["rows"].update(later=0), "the table later"),
        (lambda manifest: manifest["rows"].update(apps=7), "apps has 1 rows instead of 7"),
        (lambda manifest: manifest["sha256"].pop("apps.jsonl"), "a member is missing or unknown"),
        (lambda manifest: manifest["sha256"].update({"apps.jsonl": "0"}), "apps.jsonl has another checksum"),
        (lambda manifest: manifest.pop("format"), "a part is missing or changed"),
        (lambda manifest: manifest.update(format="x"), "not a complete backup"),
    ],
)
def test_an_archive_that_does_not_fit_changes_nothing(
    full: Settings, archive: Path, change: Callable[[dict[str, Any]], None], cause: str, force: bool
) -> None:
    rewrite(archive, change)
    before = files(full.root)
    with pytest.raises(BackupError, match=cause) as caught:
        home_backup.restore(full, archive, force=force)
    assert "\n" not in str(caught.value) and files(full.root) == before


def test_an_archive_with_an_unknown_column_names_the_release_to_install(full: Settings, archive: Path) -> None:
    with zipfile.ZipFile(archive) as old:
        lines = old.read("apps.jsonl").replace(b'"source"', b'"later"')
    members = {"apps.jsonl": lines}
    with zipfile.ZipFile(archive) as old:
        members = {name: old.read(name) for name in old.namelist()} | members
    with zipfile.ZipFile(archive, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)

    def newer(manifest: dict[str, Any]) -> None:
        manifest["sha256"]["apps.jsonl"] = hashlib.sha256(lines).hexdigest()
        manifest["llmrun"] = "9.9"

    rewrite(archive, newer)
    with pytest.raises(BackupError, match=r"the column apps\.later, which .* Install llmrun 9\.9 or later"):
        home_backup.restore(full, archive, force=True)


def test_a_restore_that_fails_half_way_changes_nothing(
    full: Settings, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    execute(full.root / "llmrun.db", "UPDATE apps SET source = 'later'")
    before = files(full.root) | {"up.lock": b""}
    monkeypatch.setattr(backup_module, "run_migrations", full_disk)
    with pytest.raises(OSError, match="No space left"):
        home_backup.restore(full, archive, force=True)
    assert files(full.root) == before


def test_a_home_with_models_or_keys_is_replaced_only_with_force(full: Settings, archive: Path) -> None:
    execute(full.root / "llmrun.db", "UPDATE apps SET source = 'later'; DELETE FROM models")
    full.admin_key_file.write_text("later")
    with pytest.raises(BackupError, match=r"is not empty \(models: 0, API keys: 1\)\. To replace it, use --force"):
        home_backup.restore(full, archive, force=False)
    assert full.admin_key_file.read_text() == "later"
    with closing(sqlite3.connect(full.root / "llmrun.db")) as killed:  # it leaves its log behind
        killed.execute("PRAGMA journal_mode = WAL")
        killed.execute("UPDATE apps SET source = 'in the log'")
        killed.commit()
        logs = {suffix: (full.root / f"llmrun.db{suffix}").read_bytes() for suffix in ("-wal", "-shm")}
    for suffix, data in logs.items():
        (full.root / f"llmrun.db{suffix}").write_bytes(data)
    home_backup.restore(full, archive, force=True)
    assert [row["source"] for row in read(full)["apps"]] == ["host:/app.py — ünïcode\n"]
    assert len(full.admin_key_file.read_text()) == 64
    (full.root / "llmrun.db").write_bytes(b"not a database" * 100)
    with pytest.raises(BackupError, match=r"present database cannot be read: .* Use --force"):
        home_backup.restore(full, archive, force=False)
    home_backup.restore(full, archive, force=True)
    assert len(read(full)["models"]) == 1


def test_a_home_whose_cluster_runs_is_not_restored(empty: Settings, archive: Path) -> None:
    with lock_home(empty), pytest.raises(BackupError, match=r"a cluster runs in .*Stop it first: `llmrun down`"):
        home_backup.restore(empty, archive, force=True)
    ClusterFile("http://127.0.0.1:8000", "127.0.0.1:6379").write(empty.cluster_file)  # on a Ray that it joined
    with pytest.raises(BackupError, match=r"a cluster runs in .*Stop it first: `llmrun down`"):
        home_backup.restore(empty, archive, force=True)
    assert not (empty.root / "llmrun.db").exists()
    empty.cluster_file.unlink()
    home_backup.restore(empty, archive, force=False)


def test_a_database_of_a_newer_release_is_not_backed_up(full: Settings, tmp_path: Path) -> None:
    execute(full.root / "llmrun.db", "UPDATE meta SET value = '7' WHERE key = 'schema_version'")
    with pytest.raises(BackupError, match="schema version 7, of a release newer than"):
        home_backup.back_up(full, tmp_path / "backup.zip", force=False)
    assert not (tmp_path / "backup.zip").exists()


def test_the_commands_and_their_errors(home: Home, full: Settings, tmp_path: Path) -> None:
    path, env = tmp_path / "backup.zip", {"LLMRUN_HOME": str(full.root)}
    assert "nothing to back up: there is no database of llmrun at" in home.fails("backup", path)
    assert not home.path.exists()
    assert "Backed up 1 model and 1 API key to" in home.ok("backup", path, **env)
    good = path.read_bytes()
    assert "it already exists. Choose another name, or use --force" in home.fails("backup", path, **env)
    home.ok("backup", path, "--force", **env)
    assert "is a directory. Name a file in it" in home.fails("backup", tmp_path, "--force", **env)
    missing = tmp_path / "missing" / "backup.zip"
    assert f"cannot write {missing}: No such file or directory" in home.fails("backup", missing, **env)
    assert "cannot write /sys/backup.zip: " in home.fails("backup", "/sys/backup.zip", **env)  # also for root
    no_url = home.fails("backup", path, "--force", LLMRUN_DATABASE_URL="nonsense")
    assert "cannot back up: Could not parse SQLAlchemy URL" in no_url
    (tmp_path / "text").write_text("hello")
    (tmp_path / "half.zip").write_bytes(good[: len(good) // 2])
    (tmp_path / "nothing").touch()
    for name in ("text", "half.zip", "nothing"):
        assert "it is not a complete backup of llmrun (" in home.fails("restore", tmp_path / name)
    assert f"cannot read {tmp_path}: Is a directory" in home.fails("restore", tmp_path)
    assert "No such file or directory" in home.fails("restore", tmp_path / "missing.zip")
    assert not home.path.exists()
    assert f"into {home.path}. Start them with `llmrun up`." in home.ok("restore", path)
    assert "is not empty (models: 1, API keys: 1). To replace it, use --force" in home.fails("restore", path)
    assert read(Settings(home=home.path)) == read(full)
