"""Copies control's tables and the admin key into an archive, and back into any other database.

The archive is a zip: `manifest.json`, one file of JSON lines per table, one member per code package, and `admin.key`.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import Column, Connection, Engine, LargeBinary, Table, delete, func, insert, inspect, make_url, select
from sqlalchemy.exc import SQLAlchemyError

import llmrun
from llmrun.errors import BackupError
from llmrun_runtime.control.state.connection import make_engine
from llmrun_runtime.control.state.migrations import MIGRATIONS, add_missing, begin, run_migrations, stored_version
from llmrun_runtime.control.state.tables import Base, KeyRow, ModelRow

FORMAT = 1
MANIFEST, ADMIN_KEY = "manifest.json", "admin.key"
BATCH_ROWS = 500
BLOCK_BYTES = 2**20
# What zipfile, zlib, json and pydantic raise for an archive that is not whole.
DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError),
    *(NotImplementedError, OverflowError, RuntimeError, TypeError, lzma.LZMAError),
)


class Manifest(BaseModel):
    """What an archive contains."""

    format: int
    llmrun: str
    """The release that wrote it."""
    created: float
    """Unix time."""
    schema_version: int
    rows: dict[str, int]
    """By table."""
    sha256: dict[str, str]
    """By member."""


def write_backup(url: str, admin_key_file: Path, path: Path) -> Manifest:
    """Write the database at `url` and the admin key, if there is one, to `path` (mode 0600).

    All rows are from one moment; other processes may write meanwhile. Raises BackupError, SQLAlchemyError, OSError.
    """
    if (file := sqlite_file(url)) and not file.exists():
        raise _nothing_at(str(file))
    with _engine(url) as engine, _snapshot(engine) as connection:
        tables = _stored_columns(connection)
        if not tables:
            raise _nothing_at(engine.url.render_as_string(hide_password=True))
        version = stored_version(connection)
        if version > len(MIGRATIONS):
            raise BackupError(
                f"cannot back up: the database has schema version {version}, of a release newer than "
                f"{llmrun.__version__}. Install that release"
            )
        manifest = Manifest(
            format=FORMAT,
            llmrun=llmrun.__version__,
            created=time.time(),
            schema_version=version,
            rows={},
            sha256={},
        )
        with replacing(path) as draft, zipfile.ZipFile(draft, "w") as archive:
            for table, columns in tables.items():
                _write_table(connection, table, columns, archive, manifest)
            if admin_key_file.exists():
                with _member(archive, manifest, ADMIN_KEY) as write:
                    write(admin_key_file.read_bytes())
            archive.writestr(_info(MANIFEST), manifest.model_dump_json(indent=2))
    return manifest


@contextmanager
def open_backup(path: Path) -> Iterator[Backup]:
    """Open an archive of which every byte has been checked. Raises BackupError."""
    with ExitStack() as stack:
        try:
            with _damage_explained(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                backup = Backup(archive)
        except OSError as error:
            raise BackupError(f"cannot read {path}: {error.strerror or error}") from error
        yield backup


class Backup:
    """A checked archive."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.manifest = self._check()

    def restore(self, url: str, admin_key_file: Path, *, force: bool) -> None:
        """Replace the rows of the database at `url`, and the admin key if the archive has one; all or nothing.

        Raises BackupError if the database has models or keys, unless `force`; SQLAlchemyError, OSError.
        """
        if not force:
            _check_is_empty(url)
        with ExitStack() as files:  # renames the database first
            if ADMIN_KEY in self.manifest.sha256:
                draft = files.enter_context(replacing(admin_key_file))
                draft.write_bytes(self._archive.read(ADMIN_KEY))
            if file := sqlite_file(url):
                draft = files.enter_context(replacing(file))
                self._load(make_url(url).set(database=str(draft)).render_as_string(hide_password=False))
                # SQLite would apply the old file's log to the new one.
                for suffix in ("-wal", "-shm"):
                    Path(f"{file}{suffix}").unlink(missing_ok=True)
            else:
                self._load(url)

    def _load(self, url: str) -> None:
        tables = Base.metadata.sorted_tables
        with _engine(url) as engine, begin(engine) as connection:
            add_missing(connection)
            for table in reversed(tables):
                connection.execute(delete(table))
            for table in tables:
                for rows in self._batches(table):
                    connection.execute(insert(table), rows)
            run_migrations(connection, self.manifest.schema_version)

    def _batches(self, table: Table) -> Iterator[list[dict[str, Any]]]:
        """The table's rows, without numbers that the database counts up itself: it continues after its own."""
        binary, counted = _binary_columns(table), table.autoincrement_column
        size = 1 if binary else BATCH_ROWS
        batch: list[dict[str, Any]] = []
        for row in self._rows(table.name):
            if counted is not None:
                row.pop(counted.name, None)
            batch.append(row | {name: self._archive.read(row[name]) for name in binary})
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _rows(self, table: str) -> Iterator[dict[str, Any]]:
        if table in self.manifest.rows:
            with self._archive.open(_table_member(table)) as file:
                yield from map(json.loads, file)

    def _check(self) -> Manifest:
        """Check format, release, checksums and rows. Raises BackupError, or one of DAMAGED."""
        content = json.loads(self._archive.read(MANIFEST))
        if content["format"] > FORMAT:
            raise _newer(str(content.get("llmrun")), f"format {content['format']}")
        manifest = Manifest.model_validate(content)
        if manifest.schema_version > len(MIGRATIONS):
            raise _newer(manifest.llmrun, f"schema version {manifest.schema_version}")
        if unknown := manifest.rows.keys() - Base.metadata.tables.keys():
            raise _newer(manifest.llmrun, f"the table {min(unknown)}")
        if sorted(self._archive.namelist()) != sorted([MANIFEST, *manifest.sha256]):
            raise ValueError("a member is missing or unknown")
        for name, digest in manifest.sha256.items():
            with self._archive.open(name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:  # type: ignore[arg-type]
                    raise ValueError(f"{name} has another checksum")
        self.manifest = manifest
        for table, count in manifest.rows.items():
            self._check_rows(Base.metadata.tables[table], count)
        return manifest

    def _check_rows(self, table: Table, count: int) -> None:
        found = 0
        for row in self._rows(table.name):
            found += 1
            if unknown := row.keys() - table.columns.keys():
                raise _newer(self.manifest.llmrun, f"the column {table.name}.{min(unknown)}")
            if missing := {row[name] for name in _binary_columns(table)} - self.manifest.sha256.keys():
                raise ValueError(f"{min(missing)} is missing")
        if found != count:
            raise ValueError(f"{table.name} has {found} rows instead of {count}")


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite database; None for a server."""
    parsed = make_url(url)
    return Path(parsed.database or ":memory:").resolve() if parsed.get_backend_name() == "sqlite" else None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file (mode 0600) beside `path`, which replaces it after the block. Removed after an error."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise BackupError(f"cannot write {path}: {error.strerror}") from error
    os.close(descriptor)
    try:
        yield Path(name)
        _sync(Path(name))
        Path(name).replace(path)
        _sync(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _engine(url: str) -> Iterator[Engine]:
    engine = make_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _snapshot(engine: Engine) -> Iterator[Connection]:
    """A connection that reads one state of the database, while other processes write."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")  # its driver begins no transaction for reads
            yield connection
    else:
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            yield connection


def _stored_columns(connection: Connection) -> dict[Table, list[Column[Any]]]:
    """Return the tables that the database has, with the columns that it has: an older release may have made it."""
    inspector = inspect(connection)
    tables: dict[Table, list[Column[Any]]] = {}
    for table in Base.metadata.sorted_tables:
        if inspector.has_table(table.name):
            names = {column["name"] for column in inspector.get_columns(table.name)}
            tables[table] = [column for column in table.columns if column.name in names]
    return tables


def _write_table(
    connection: Connection, table: Table, columns: list[Column[Any]], archive: zipfile.ZipFile, manifest: Manifest
) -> None:
    """Write the rows; their binary values are replaced by the names of their members."""
    binary = _binary_columns(table)
    plain = [column for column in columns if column.name not in binary]
    query = select(*plain).order_by(*table.primary_key.columns).execution_options(yield_per=BATCH_ROWS)
    keys: list[dict[str, Any]] = []
    with _member(archive, manifest, _table_member(table.name)) as write:
        count = 0
        for row in connection.execute(query).mappings():
            members = {name: f"{table.name}/{count}.{name}" for name in binary}
            if binary:
                keys.append({column.name: row[column] for column in table.primary_key.columns})
            values = {column.name: row[column] for column in plain}
            write(json.dumps(values | members).encode() + b"\n")
            count += 1
    manifest.rows[table.name] = count
    for number, key in enumerate(keys):  # one value in memory at a time
        for name in binary:
            value: bytes = connection.execute(select(table.columns[name]).filter_by(**key)).scalar_one()
            with _member(archive, manifest, f"{table.name}/{number}.{name}") as write:
                write(value)


@contextmanager
def _member(archive: zipfile.ZipFile, manifest: Manifest, name: str) -> Iterator[Callable[[bytes], None]]:
    """Yield a function that appends to a new member. Puts the member's checksum in the manifest."""
    digest = hashlib.sha256()
    with archive.open(_info(name), "w", force_zip64=True) as file:

        def write(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        yield write
    manifest.sha256[name] = digest.hexdigest()


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    # Code packages are compressed already.
    info.compress_type = zipfile.ZIP_DEFLATED if name.endswith((".jsonl", ".json")) else zipfile.ZIP_STORED
    info.external_attr = 0o600 << 16
    return info


def _table_member(table: str) -> str:
    return f"{table}.jsonl"


def _binary_columns(table: Table) -> list[str]:
    return [column.name for column in table.columns if isinstance(column.type, LargeBinary)]


def _check_is_empty(url: str) -> None:
    """Raise BackupError if the database has models or keys, or cannot be read."""
    file = sqlite_file(url)
    if file and not file.exists():
        return
    try:
        with _engine(url) as engine, engine.connect() as connection:
            inspector = inspect(connection)
            counts = {
                what: connection.scalar(select(func.count()).select_from(row))
                for what, row in (("models", ModelRow), ("API keys", KeyRow))
                if inspector.has_table(row.__tablename__)
            }
            place = engine.url.render_as_string(hide_password=True)
    except SQLAlchemyError as error:
        reason = str(error).partition("\n")[0]
        raise BackupError(f"cannot restore: the present database cannot be read: {reason}. Use --force") from error
    if any(counts.values()):
        found = ", ".join(f"{what}: {count}" for what, count in counts.items())
        raise BackupError(f"cannot restore: {place} is not empty ({found}). To replace it, use --force")


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        cause = "a part is missing or changed" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise BackupError(
            f"cannot restore {path}: it is not a complete backup of llmrun ({cause}). Use another one"
        ) from error


def _newer(release: str, what: str) -> BackupError:
    return BackupError(
        f"cannot restore: the backup has {what}, which llmrun {llmrun.__version__} does not know. "
        f"Install llmrun {release} or later"
    )


def _nothing_at(place: str) -> BackupError:
    return BackupError(
        f"nothing to back up: there is no database of llmrun at {place}. Set LLMRUN_HOME or LLMRUN_DATABASE_URL "
        "as for `llmrun up`"
    )
