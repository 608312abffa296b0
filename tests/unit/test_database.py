"""Control's database: its settings, upgrades from older releases, rows of newer ones, and what it deletes."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import URL, make_url
from sqlalchemy.exc import OperationalError

from llmrun.spec import ModelSpec
from llmrun.weights import Weights
from llmrun.wire import ColdStart, KeyInfo, NewKey, Status, WeightsRequest
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.state import connection as connection_module
from llmrun_runtime.control.state import database as database_module
from llmrun_runtime.control.state import migrations
from llmrun_runtime.control.state.connection import engine_options
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.pin import File, Pin

FIRST_RELEASE = """
CREATE TABLE apps (name VARCHAR(63) NOT NULL, source TEXT NOT NULL, PRIMARY KEY (name));
CREATE TABLE models (name VARCHAR(63) NOT NULL, app VARCHAR(63) NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (name));
CREATE TABLE versions (model VARCHAR(63) NOT NULL, number INTEGER NOT NULL, engine_version INTEGER NOT NULL,
    spec TEXT NOT NULL, placement TEXT NOT NULL, proven BOOLEAN NOT NULL, created FLOAT NOT NULL,
    PRIMARY KEY (model, number));
CREATE TABLE pins (model VARCHAR(63) NOT NULL, number INTEGER NOT NULL, pin TEXT NOT NULL, PRIMARY KEY (model, number));
CREATE TABLE "usage" (day VARCHAR(10) NOT NULL, "key" VARCHAR(63) NOT NULL, model VARCHAR(63) NOT NULL,
    adapter VARCHAR(255) NOT NULL, requests BIGINT NOT NULL, prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL, gpu_seconds FLOAT NOT NULL,
    PRIMARY KEY (day, "key", model, adapter));
INSERT INTO apps VALUES ('app', 'host:/app.py');
INSERT INTO models VALUES ('one', 'app', 1);
INSERT INTO versions VALUES ('one', 1, 1, '{"name": "one", "model": "org/one"}', '{"cpus": 1, "gpus": 0}', 1, 5.0);
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "llmrun.db"


def opened(path: Path) -> Database:
    database = Database(f"sqlite:///{path}")
    database.session().close()  # creates the tables
    return database


def deployed(name: str = "one", version: int = 1, **options: Any) -> Deployed:
    spec = ModelSpec(name=name, model=Weights("org/model"), **options)
    pin = Pin(weights=Weights("org/model"), revision=str(version), files=(File(name="config.json", size=2),))
    return Deployed("app", version, version, spec, Placement(1, 0), proven=True, pin=pin)


def execute(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def add_field(path: Path, table: str, column: str, *keys: str) -> None:
    """Add an unknown field to all JSON objects of a column, or to the objects inside them at `keys`."""
    with closing(sqlite3.connect(path)) as connection:
        for rowid, text in connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
            value = json.loads(text)
            inner = value
            for key in keys:
                inner = inner[int(key)] if isinstance(inner, list) else inner[key]
            inner["of_a_later_release"] = 1
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (json.dumps(value), rowid))
        connection.commit()


def test_sqlite_lets_readers_continue_and_waits_for_writers(path: Path) -> None:
    with opened(path).session() as session:
        connection = session.connection()
        pragmas = ("journal_mode", "synchronous", "busy_timeout")
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    assert values == ["wal", 1, 12_000]  # 1: NORMAL


def test_connections_to_a_server_are_checked_and_time_out() -> None:
    server = engine_options(make_url("postgresql+psycopg://db/llmrun"))
    assert server["pool_pre_ping"] and server["connect_args"]["connect_timeout"] == 10
    assert server["connect_args"]["options"] == "-c statement_timeout=12s"
    own = engine_options(make_url("postgresql+psycopg://db/llmrun?connect_timeout=3"))["connect_args"]
    assert "connect_timeout" not in own and "options" in own
    assert engine_options(make_url("mysql+pymysql://db/llmrun")) == {"pool_pre_ping": True}
    assert engine_options(make_url("sqlite:///llmrun.db")) == {}


def test_a_database_is_opened_with_these_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(url: URL, **options: Any) -> None:
        raise ImportError(f"{url.get_backend_name()} {options}")  # no driver is installed for the tests

    monkeypatch.setattr(connection_module, "create_engine", create)
    with pytest.raises(ImportError, match=r"mysql \{'pool_pre_ping': True\}"):
        Database("mysql+pymysql://db/llmrun")


def test_a_database_without_a_schema_version_is_copied_and_updated(path: Path) -> None:
    execute(path, FIRST_RELEASE + 'ALTER TABLE "usage" DROP COLUMN gpu_seconds;')
    with pytest.raises(sqlite3.OperationalError):
        rows(path, 'SELECT gpu_seconds FROM "usage"')
    database = opened(path)
    models, sources = database.load()
    assert models["one"].spec.model.source == "org/one" and models["one"].created == 5
    assert sources == {"app": "host:/app.py"} and not database.unreadable
    database.put_version(deployed(version=2), active=True)
    assert rows(path, 'SELECT gpu_seconds FROM "usage"') == []
    assert rows(path, "SELECT value FROM meta WHERE key = 'schema_version'") == [("1",)]
    copy = path.with_name("llmrun.db.before-v1")
    assert copy.stat().st_mode & 0o777 == 0o600
    assert rows(copy, "SELECT version FROM models") == [(1,)] and rows(path, "SELECT version FROM models") == [(2,)]
    database.close()


def test_migrations_run_once_and_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(path).close()
    assert list(path.parent.glob("*.before-*")) == []  # a new database needs no update
    steps = (
        (),
        ("CREATE TABLE steps (step INTEGER)", "INSERT INTO steps VALUES (2)"),
        ("INSERT INTO steps VALUES (3)",),
    )
    monkeypatch.setattr(migrations, "MIGRATIONS", steps)
    opened(path).close()
    opened(path).close()
    assert rows(path, "SELECT step FROM steps") == [(2,), (3,)]
    assert rows(path, "SELECT value FROM meta WHERE key = 'schema_version'") == [("3",)]


def test_a_failed_migration_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(path).close()
    monkeypatch.setattr(migrations, "MIGRATIONS", ((), ("CREATE TABLE steps (step INTEGER)", "no SQL")))
    with pytest.raises(OperationalError, match="syntax error"):
        opened(path)
    assert rows(path, "SELECT name FROM sqlite_master WHERE name = 'steps'") == []
    assert rows(path, "SELECT value FROM meta WHERE key = 'schema_version'") == [("1",)]


def test_a_database_of_a_newer_release_works(path: Path) -> None:
    database = opened(path)
    database.put_version(deployed(), active=True)
    database.close()
    execute(
        path,
        """UPDATE meta SET value = '7' WHERE key = 'schema_version';
        ALTER TABLE versions ADD COLUMN later TEXT;
        ALTER TABLE models ADD COLUMN later INTEGER NOT NULL DEFAULT 3;""",
    )
    database = opened(path)
    assert database.load()[0].keys() == {"one"}
    database.put_version(deployed("two"), active=True)
    assert database.load()[0].keys() == {"one", "two"}
    assert rows(path, "SELECT value FROM meta WHERE key = 'schema_version'") == [("7",)]
    database.close()


def test_fields_of_a_newer_release_are_ignored(path: Path) -> None:
    database = opened(path)
    options: dict[str, Any] = {"accelerator": "A10G:2", "lora": {"path": {"source": "org/lora", "include": ["*"]}}}
    row = deployed(**options, code={"package": "p", "file": "app.py", "cls": "One"})
    database.put_version(row, active=True)
    start = ColdStart(model="one", version=1, node="n", forked=False, asked=1, parts={"first_token": 2})
    database.put_cold_start(start)
    created = Keys(database).create(KeyInfo(name="ci", rpm=5))
    for keys in ((), ("accelerator",), ("lora",), ("lora", "path"), ("code",)):
        add_field(path, "versions", "spec", *keys)
    add_field(path, "versions", "placement")
    add_field(path, "pins", "pin")
    add_field(path, "pins", "pin", "files", "0")
    add_field(path, "starts", "start")
    add_field(path, '"keys"', "facts")
    assert database.load()[0] == {"one": row} and not database.unreadable
    assert database.cold_starts("one") == [start]
    keys_again = Keys(database)
    keys_again.load()
    assert keys_again.rows() == [created.facts]


@pytest.mark.parametrize(
    ("table", "column", "text", "cause"),
    [
        ("versions", "spec", '{"name": "Not a label", "model": "org/model"}', "ModelSpec: name: Value error, name="),
        ("versions", "spec", '{"name": "bad", "model": "s3://"}', "ModelSpec: "),
        ("versions", "spec", "{", "ModelSpec: Expecting"),
        ("versions", "placement", '{"gpus": 1}', "Placement: "),
        ("versions", "placement", "[]", "Placement: "),
        ("pins", "pin", '{"weights": "org/model"}', "Pin: files: Field required"),
    ],
)
def test_a_version_that_cannot_be_read_is_left_out(path: Path, table: str, column: str, text: str, cause: str) -> None:
    database = opened(path)
    database.put_version(deployed("bad"), active=True)
    database.put_version(deployed("good"), active=True)
    execute(path, f"UPDATE {table} SET {column} = '{text}' WHERE model = 'bad'")
    assert database.load()[0].keys() == {"good"}
    assert database.unreadable.keys() == {"bad"}
    assert database.unreadable["bad"].startswith(f"cannot read version 1: {cause}")
    assert "\n" not in database.unreadable["bad"]
    database.remove(["other"])  # looks at the packages of all versions
    database.put_version(deployed("bad", 2), active=True)
    assert not database.unreadable and database.load()[0].keys() == {"bad", "good"}


def test_a_cold_start_that_cannot_be_read_is_left_out(path: Path) -> None:
    database = opened(path)
    start = ColdStart(model="one", version=1, node="n", forked=False, asked=1, parts={})
    database.put_cold_start(start)
    database.put_cold_start(start)
    execute(path, "UPDATE starts SET start = '{}' WHERE id = 1")
    assert database.cold_starts("one") == [start]


def test_a_key_that_cannot_be_read_is_not_valid(path: Path) -> None:
    database = opened(path)
    keys = Keys(database)
    keys.create(KeyInfo(name="bad"))
    execute(path, """UPDATE "keys" SET facts = '{"name": "bad", "rpm": -1}'""")
    keys = Keys(database)
    keys.load()
    (bad,) = keys.routes.values()  # without any key, the ingress would require none
    assert bad.name == "bad" and bad.expires
    keys.revoke("bad")
    assert not keys.routes and rows(path, 'SELECT * FROM "keys"') == []


def test_a_model_that_failed_is_still_there_after_a_restart(path: Path) -> None:
    database = opened(path)
    database.put_version(deployed("new"), active=False, cause="it has no chat template")
    database.put_version(deployed("old", 1), active=True)
    database.put_version(deployed("old", 2), active=False, cause="out of memory")
    database.put_version(deployed("mended", 1), active=False, cause="out of memory")
    database.put_version(deployed("mended", 2), active=True)
    failed = opened(path).failed()
    assert {name: (row.version, row.app, cause) for name, (row, cause) in failed.items()} == {
        "new": (1, "app", "it has no chat template"),
        "old": (2, "app", "out of memory"),
    }
    database.remove(["new"])
    assert opened(path).failed().keys() == {"old"}


def test_only_the_last_versions_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "PACKAGE_GRACE_S", -1)
    database = opened(path)

    def put(version: int, *, active: bool, package: str = "new") -> None:
        code = {"package": package, "file": "app.py", "cls": "One"}
        database.put_version(deployed(version=version, code=code), active=active)

    database.put_package("old", b"old")
    database.put_package("new", b"new")
    put(1, active=False, package="old")
    put(2, active=True)
    for version in range(3, 23):
        put(version, active=False)
    kept = [(2,), *((version,) for version in range(3, 23))]  # the active one, and the last 20
    assert rows(path, "SELECT number FROM versions ORDER BY number") == kept
    assert rows(path, "SELECT number FROM pins ORDER BY number") == kept
    assert not database.has_package("old") and database.has_package("new")
    assert database.load()[0]["one"].version == 2
    put(23, active=True)
    assert rows(path, "SELECT min(number), count(*) FROM versions") == [(4, 20)]


def test_a_package_that_a_deploy_asks_for_is_kept(path: Path) -> None:
    database = opened(path)
    database.put_package("asked", b"")
    database.put_package("unused", b"")
    execute(path, "UPDATE packages SET created = 0")
    assert database.has_package("asked")
    database.remove([])
    assert (database.has_package("asked"), database.has_package("unused")) == (True, False)


def test_each_database_has_an_id(path: Path) -> None:
    first, other = opened(path), opened(path.with_name("other.db"))
    assert first.cluster_id() != other.cluster_id()
    assert opened(path).cluster_id() == first.cluster_id()


def test_answers_ignore_unknown_fields_and_requests_refuse_them() -> None:
    status = {"url": "http://a", "models": [], "later": 1}
    assert Status.model_validate(status) == Status(url="http://a", models=())
    answer = NewKey.model_validate({"key": "sk", "facts": {"name": "ci", "later": 1}, "later": 1})
    assert answer.facts.name == "ci"
    with pytest.raises(ValidationError, match="later"):
        KeyInfo.model_validate({"name": "ci", "later": 1})
    with pytest.raises(ValidationError, match="later"):
        WeightsRequest.model_validate({"do": "prune", "later": 1})
