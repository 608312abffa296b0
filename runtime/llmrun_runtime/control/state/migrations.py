"""Brings the tables of an older release up to date when the database is opened.

An older release must be able to use the tables of a newer one: a migration adds tables and columns, but it removes and
renames none. A new column is nullable or has a server default.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, insert, inspect, select, update
from sqlalchemy.schema import CreateColumn

from llmrun.errors import ClusterError
from llmrun_runtime.control.state.tables import Base, MetaRow

log = logging.getLogger("llmrun.control")
MIGRATIONS: tuple[tuple[str, ...], ...] = ((),)
"""The statements from each schema version to the next one, after missing tables and columns were added.

Version 0 is a database without a stored version.
"""
VERSION, CLUSTER_ID = "schema_version", "cluster_id"


def migrate(engine: Engine) -> None:
    """Create or update the tables. Copies a SQLite file first if it must be updated."""
    with engine.connect() as connection:
        stored = stored_version(connection)
        missing = _missing_columns(connection)
        is_new = Base.metadata.tables.keys().isdisjoint(inspect(connection).get_table_names())
    current = len(MIGRATIONS)
    outdated = not is_new and (stored < current or bool(missing))
    if outdated and engine.dialect.name == "sqlite":
        _copy_sqlite(engine, f".before-v{current}")
    with begin(engine) as connection:
        add_missing(connection)
        run_migrations(connection, stored if outdated else current)
    if stored > current:
        log.warning("the database has schema version %d, newer than %d of this release", stored, current)


@contextmanager
def begin(engine: Engine) -> Iterator[Connection]:
    """Run the block in a transaction that also covers changes of tables, if the database can do that."""
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":  # its driver begins no transaction for DDL
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def add_missing(connection: Connection) -> None:
    """Create the tables and columns that the database lacks."""
    missing = _missing_columns(connection)
    Base.metadata.create_all(connection)
    for table, column in missing:
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column}")


def run_migrations(connection: Connection, since: int) -> None:
    """Bring rows of schema version `since` up to date. Store the version, and an id if there is none."""
    for statements in MIGRATIONS[since:]:
        for statement in statements:
            connection.exec_driver_sql(statement)
    _put_meta(connection, VERSION, str(max(stored_version(connection), len(MIGRATIONS))))
    if _meta(connection, CLUSTER_ID) is None:
        _put_meta(connection, CLUSTER_ID, uuid.uuid4().hex)


def stored_version(connection: Connection) -> int:
    """Return the database's schema version."""
    if not inspect(connection).has_table(MetaRow.__tablename__):
        return 0
    return int(_meta(connection, VERSION) or 0)


def _missing_columns(connection: Connection) -> list[tuple[str, str]]:
    """Return the columns that existing tables lack, as pairs of table and DDL."""
    inspector, dialect = inspect(connection), connection.dialect
    return [
        (dialect.identifier_preparer.format_table(table), str(CreateColumn(column).compile(dialect=dialect)))
        for table in Base.metadata.sorted_tables
        if inspector.has_table(table.name)
        for column in table.columns
        if column.name not in {existing["name"] for existing in inspector.get_columns(table.name)}
    ]


def _meta(connection: Connection, key: str) -> str | None:
    return connection.scalar(select(MetaRow.value).where(MetaRow.key == key))


def _put_meta(connection: Connection, key: str, value: str) -> None:
    if _meta(connection, key) is None:
        connection.execute(insert(MetaRow).values(key=key, value=value))
    else:
        connection.execute(update(MetaRow).where(MetaRow.key == key).values(value=value))


def _copy_sqlite(engine: Engine, suffix: str) -> None:
    """Copy the database to a file beside it that only its owner can read. Raises ClusterError."""
    connection = engine.raw_connection()
    try:
        source = connection.driver_connection
        assert isinstance(source, sqlite3.Connection)
        file = source.execute("PRAGMA database_list").fetchone()[2]
        if not file:
            return  # in memory
        path = Path(file + suffix)
        try:
            _copy(source, path)
        except (OSError, sqlite3.Error) as error:
            raise ClusterError(
                f"cannot update the database: cannot copy it to {path}: {error}. Check the disk's free space"
            ) from error
        log.info("copied the database to %s before its update", path)
    finally:
        connection.close()


def _copy(source: sqlite3.Connection, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    copy = sqlite3.connect(partial)
    try:
        source.backup(copy)
    finally:
        copy.close()
    partial.replace(path)
