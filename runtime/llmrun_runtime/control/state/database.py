"""Stores apps, models with their versions, code packages and cold starts. SQLite, or any SQLAlchemy URL.

Control is the only writer.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from sqlalchemy import URL, create_engine, delete, event, make_url, select, update
from sqlalchemy.orm import Session

from llmrun.spec import ModelSpec
from llmrun.wire import ColdStart
from llmrun_runtime.control.state.migrations import CLUSTER_ID, migrate
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.control.state.stored_json import read_stored
from llmrun_runtime.control.state.tables import (
    AdaptersRow,
    AppRow,
    ColdStartRow,
    MetaRow,
    ModelRow,
    NumberRow,
    PackageRow,
    PinRow,
    VersionRow,
)
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.pin import Pin

log = logging.getLogger("llmrun.control")
# Longer than a deploy of many models, whose packages are uploaded at its start.
PACKAGE_GRACE_S = 24 * 3600
KEEP_COLD_STARTS = 1000  # per model
KEEP_VERSIONS = 20  # per model
BUSY_TIMEOUT_MS = 30_000
CONNECT_TIMEOUT_S = 10
LIBPQ_DRIVERS = ("psycopg", "psycopg2")


class Database:
    """Queries and transactions over the tables."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self._engine = create_engine(parsed, **engine_options(parsed))
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _set_up_sqlite)
        self.unreadable: dict[str, str] = {}
        """By model name, why the active version could not be read by `load`."""
        migrate(self._engine)

    def session(self) -> Session:
        """Open a session, for modules with their own tables: `with database.session() as session, session.begin()`."""
        return Session(self._engine)

    def cluster_id(self) -> str:
        """Return the random id that the database got when it was created."""
        with Session(self._engine) as session:
            return session.scalars(select(MetaRow.value).where(MetaRow.key == CLUSTER_ID)).one()

    def load(self) -> tuple[dict[str, Deployed], dict[str, str]]:
        """Return the active versions by model name, and the apps' sources by app name.

        Versions that cannot be read are left out; `unreadable` has their causes.
        """
        with Session(self._engine) as session:
            of_version = (PinRow.model == VersionRow.model) & (PinRow.number == VersionRow.number)
            active_version = (VersionRow.model == ModelRow.name) & (VersionRow.number == ModelRow.version)
            query = (
                select(ModelRow, VersionRow, PinRow.pin)
                .join(VersionRow, active_version)
                .join(PinRow, of_version, isouter=True)
            )
            models: dict[str, Deployed] = {}
            self.unreadable = {}
            for model, version, pin in session.execute(query):
                try:
                    models[model.name] = _deployed(model.app, version, pin)
                except ValueError as error:
                    self.unreadable[model.name] = f"cannot read version {version.number}: {error}"
                    log.warning("%s: %s", model.name, self.unreadable[model.name])
            return models, {row.name: row.source for row in session.scalars(select(AppRow))}

    def next_version(self, model: str) -> int:
        """Return the number for a model's next version. Numbers of failed and deleted versions are not reused."""
        with Session(self._engine) as session:
            return _last_number(session, model) + 1

    def put_version(self, deployed: Deployed, *, active: bool) -> None:
        """Store a version; `active` makes it the active one. Deletes the versions before the last KEEP_VERSIONS."""
        with Session(self._engine) as session, session.begin():
            last = max(deployed.version, _last_number(session, deployed.name))
            session.merge(NumberRow(model=deployed.name, last=last))
            session.merge(
                VersionRow(
                    model=deployed.name,
                    number=deployed.version,
                    engine_version=deployed.engine_version,
                    spec=deployed.spec.model_dump_json(),
                    placement=json.dumps(deployed.placement.__dict__),
                    proven=deployed.proven,
                    created=deployed.created,
                )
            )
            if deployed.pin:
                pin = deployed.pin.model_dump_json()
                session.merge(PinRow(model=deployed.name, number=deployed.version, pin=pin))
            if active:
                session.merge(ModelRow(name=deployed.name, app=deployed.app, version=deployed.version))
            _delete_old_versions(session, deployed.name)
        if active:
            self.unreadable.pop(deployed.name, None)

    def put_app(self, name: str, source: str) -> None:
        """Store the source that an app was deployed from."""
        with Session(self._engine) as session, session.begin():
            session.merge(AppRow(name=name, source=source))

    def remove(self, models: Iterable[str]) -> None:
        """Remove models with their versions, apps without models, and packages that no version uses."""
        models = list(models)
        with Session(self._engine) as session, session.begin():
            for name in models:
                session.merge(NumberRow(model=name, last=_last_number(session, name)))
                session.execute(delete(ModelRow).where(ModelRow.name == name))
                session.execute(delete(VersionRow).where(VersionRow.model == name))
                session.execute(delete(PinRow).where(PinRow.model == name))
                session.execute(delete(AdaptersRow).where(AdaptersRow.model == name))
                session.execute(delete(ColdStartRow).where(ColdStartRow.model == name))
            session.execute(delete(AppRow).where(AppRow.name.not_in(select(ModelRow.app))))
            _delete_unused_packages(session)
        for name in models:
            self.unreadable.pop(name, None)

    def put_cold_start(self, start: ColdStart) -> None:
        """Store a cold start, and delete the model's oldest ones beyond KEEP_COLD_STARTS."""
        with Session(self._engine) as session, session.begin():
            session.add(ColdStartRow(model=start.model, asked=start.asked, start=start.model_dump_json()))
            of_model = select(ColdStartRow.id).where(ColdStartRow.model == start.model).order_by(ColdStartRow.id.desc())
            old = session.scalars(of_model.offset(KEEP_COLD_STARTS)).all()
            session.execute(delete(ColdStartRow).where(ColdStartRow.id.in_(old)))

    def cold_starts(self, model: str, limit: int = 10) -> list[ColdStart]:
        """Return a model's last cold starts, newest first, without those that cannot be read."""
        with Session(self._engine) as session:
            rows = (
                select(ColdStartRow.start)
                .where(ColdStartRow.model == model)
                .order_by(ColdStartRow.id.desc())
                .limit(limit)
            )
            return [start for row in session.scalars(rows) if (start := _cold_start(row))]

    def package(self, digest: str) -> bytes | None:
        """Return a code package; None if it is not stored."""
        with Session(self._engine) as session:
            row = session.get(PackageRow, digest)
            return row.data if row else None

    def has_package(self, digest: str) -> bool:
        """Whether a code package is stored. Keeps it for PACKAGE_GRACE_S: a deploy is about to use it."""
        with Session(self._engine) as session, session.begin():
            found = session.scalar(select(PackageRow.digest).where(PackageRow.digest == digest)) is not None
            if found:
                session.execute(update(PackageRow).where(PackageRow.digest == digest).values(created=time.time()))
            return found

    def put_package(self, digest: str, data: bytes) -> None:
        """Store a code package."""
        with Session(self._engine) as session, session.begin():
            session.merge(PackageRow(digest=digest, data=data, created=time.time()))

    def close(self) -> None:
        """Close the database connections."""
        self._engine.dispose()


def _last_number(session: Session, model: str) -> int:
    numbers = session.scalars(select(VersionRow.number).where(VersionRow.model == model))
    row = session.get(NumberRow, model)
    return max(row.last if row else 0, max(numbers, default=0))


def engine_options(url: URL) -> dict[str, Any]:
    """Return SQLAlchemy's options for a database server: lost connections are noticed; connecting has a timeout."""
    if url.get_backend_name() == "sqlite":
        return {}
    options: dict[str, Any] = {"pool_pre_ping": True}
    is_libpq = url.get_backend_name() == "postgresql" and url.get_driver_name() in LIBPQ_DRIVERS
    if is_libpq and "connect_timeout" not in url.query:
        options["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT_S}
    return options


def _set_up_sqlite(connection: Any, _record: object) -> None:
    """Let readers continue during a write, save most fsyncs, and wait for other writers."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _deployed(app: str, version: VersionRow, pin: str | None) -> Deployed:
    """Raises ValueError if the row cannot be read."""
    return Deployed(
        app=app,
        version=version.number,
        engine_version=version.engine_version,
        spec=read_stored(ModelSpec, version.spec),
        placement=_placement(version.placement),
        proven=version.proven,
        pin=read_stored(Pin, pin) if pin else None,
        created=version.created,
    )


def _placement(text: str) -> Placement:
    known = {field.name for field in fields(Placement)}
    try:
        return Placement(**{key: value for key, value in json.loads(text).items() if key in known})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"Placement: {error}") from error


def _cold_start(text: str) -> ColdStart | None:
    try:
        return read_stored(ColdStart, text)
    except ValueError as error:
        log.warning("skipping a stored cold start: %s", error)
        return None


def _delete_old_versions(session: Session, model: str) -> None:
    """Delete a model's versions before the last KEEP_VERSIONS, but not the active one, and unused packages."""
    numbers = select(VersionRow.number).where(VersionRow.model == model).order_by(VersionRow.number.desc())
    active = session.scalar(select(ModelRow.version).where(ModelRow.name == model))
    old = [number for number in session.scalars(numbers.offset(KEEP_VERSIONS)) if number != active]
    if old:
        session.execute(delete(VersionRow).where(VersionRow.model == model, VersionRow.number.in_(old)))
        session.execute(delete(PinRow).where(PinRow.model == model, PinRow.number.in_(old)))
        _delete_unused_packages(session)


def _delete_unused_packages(session: Session) -> None:
    """Delete the packages that no version uses.

    Keeps those newer than PACKAGE_GRACE_S: they may belong to a running deploy.
    """
    used = {package for spec in session.scalars(select(VersionRow.spec)) if (package := _package_of(spec))}
    old = PackageRow.created < time.time() - PACKAGE_GRACE_S
    session.execute(delete(PackageRow).where(PackageRow.digest.not_in(used), old))


def _package_of(spec: str) -> str | None:
    try:
        code = json.loads(spec)["code"]
        return str(code["package"]) if code else None
    except (KeyError, TypeError, ValueError):  # a version that cannot be read cannot be started
        return None
