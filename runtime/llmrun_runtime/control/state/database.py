"""Stores apps, models with their versions, code packages and cold starts. SQLite, or any SQLAlchemy URL.

Control is the only writer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import ParamSpec, TypeVar

from sqlalchemy import delete, event, func, select, update
from sqlalchemy.orm import Session

from llmrun.spec import ModelSpec
from llmrun.wire import ColdStart
from llmrun_runtime.control.state.connection import make_engine
from llmrun_runtime.control.state.database_thread import DatabaseThread
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
from llmrun_runtime.wire.reports import UsedOnNodes

log = logging.getLogger("llmrun.control")
# Longer than a deploy of many models, whose packages are uploaded at its start.
PACKAGE_GRACE_S = 24 * 3600
KEEP_COLD_STARTS = 1000  # per model
KEEP_VERSIONS = 20  # per model
P = ParamSpec("P")
T = TypeVar("T")


class Database:
    """Queries and transactions over the tables.

    They block, so control's event loop gives them to `run` or `submit`. The first one creates or updates the tables.
    """

    def __init__(self, url: str) -> None:
        self._engine = make_engine(url)
        self._thread = DatabaseThread()
        self._migration = threading.Lock()
        self._migrated = False
        self.unreadable: dict[str, str] = {}
        """By model name, why the active version could not be read by `load`."""

    @property
    def url(self) -> str:
        """The URL, without its password."""
        return self._engine.url.render_as_string(hide_password=True)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """See `DatabaseThread.run`: `await database.run(database.put_version, row, active=True)`."""
        return await self._thread.run(work, *args, **kwargs)

    def submit(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """See `DatabaseThread.submit`."""
        self._thread.submit(work, *args, **kwargs)

    def session(self) -> Session:
        """Open a session, for modules with their own tables: `with database.session() as session, session.begin()`."""
        with self._migration:
            if not self._migrated:
                migrate(self._engine)
                self._migrated = True
        session = Session(self._engine)
        event.listen(session, "before_commit", self._before_commit)
        return session

    def _before_commit(self, session: Session) -> None:
        session.flush()  # waits for locks
        self._thread.check_not_given_up()

    def cluster_id(self) -> str:
        """Return the random id that the database got when it was created."""
        with self.session() as session:
            return session.scalars(select(MetaRow.value).where(MetaRow.key == CLUSTER_ID)).one()

    def load(self) -> tuple[dict[str, Deployed], dict[str, str]]:
        """Return the active versions by model name, and the apps' sources by app name.

        Versions that cannot be read are left out; `unreadable` has their causes.
        """
        with self.session() as session:
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

    def last_version(self, model: str) -> int:
        """Return the last number that `reserve_version` returned for a model; 0 if there is none."""
        with self.session() as session:
            return _last_number(session, model)

    def reserve_version(self, model: str) -> int:
        """Return the number for a model's next version. No number is returned twice, also after a delete."""
        with self.session() as session, session.begin():
            number = _last_number(session, model) + 1
            session.merge(NumberRow(model=model, last=number))
            return number

    def failed(self) -> dict[str, tuple[Deployed, str]]:
        """Return the models whose last version failed its proof: that version, and the cause, by model name."""
        with self.session() as session:
            last = select(VersionRow.model, func.max(VersionRow.number).label("number")).group_by(VersionRow.model)
            newest = last.subquery()
            is_newest = (VersionRow.model == newest.c.model) & (VersionRow.number == newest.c.number)
            of_version = (PinRow.model == VersionRow.model) & (PinRow.number == VersionRow.number)
            query = select(VersionRow, PinRow.pin).join(newest, is_newest).join(PinRow, of_version, isouter=True)
            found: dict[str, tuple[Deployed, str]] = {}
            for version, pin in session.execute(query.where(VersionRow.cause.is_not(None))):
                with contextlib.suppress(ValueError):  # of a later release: only what is active must be readable
                    found[version.model] = _deployed(version.app or "", version, pin), version.cause or ""
            return found

    def put_version(self, deployed: Deployed, *, active: bool, cause: str | None = None) -> None:
        """Store a version; `active` makes it the active one. Deletes the versions before the last KEEP_VERSIONS.

        `cause`: why its proof failed.
        """
        with self.session() as session, session.begin():
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
                    app=deployed.app,
                    cause=cause,
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

    def mark_proven(self, model: str, version: int) -> None:
        """Store that a version is proven."""
        this = (VersionRow.model == model) & (VersionRow.number == version)
        with self.session() as session, session.begin():
            session.execute(update(VersionRow).where(this).values(proven=True))

    def put_app(self, name: str, source: str) -> None:
        """Store the source that an app was deployed from."""
        with self.session() as session, session.begin():
            session.merge(AppRow(name=name, source=source))

    def remove(self, models: Iterable[str]) -> None:
        """Remove models with their versions, apps without models, and packages that no version uses."""
        models = list(models)
        with self.session() as session, session.begin():
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
        with self.session() as session, session.begin():
            session.add(ColdStartRow(model=start.model, asked=start.asked, start=start.model_dump_json()))
            of_model = select(ColdStartRow.id).where(ColdStartRow.model == start.model).order_by(ColdStartRow.id.desc())
            old = session.scalars(of_model.offset(KEEP_COLD_STARTS)).all()
            session.execute(delete(ColdStartRow).where(ColdStartRow.id.in_(old)))

    def cold_starts(self, model: str, limit: int = 10) -> list[ColdStart]:
        """Return a model's last cold starts, newest first, without those that cannot be read."""
        with self.session() as session:
            rows = (
                select(ColdStartRow.start)
                .where(ColdStartRow.model == model)
                .order_by(ColdStartRow.id.desc())
                .limit(limit)
            )
            return [start for row in session.scalars(rows) if (start := _cold_start(row))]

    def package(self, digest: str) -> bytes | None:
        """Return a code package; None if it is not stored."""
        with self.session() as session:
            row = session.get(PackageRow, digest)
            return row.data if row else None

    def has_package(self, digest: str) -> bool:
        """Whether a code package is stored. Keeps it for PACKAGE_GRACE_S: a deploy is about to use it."""
        with self.session() as session, session.begin():
            found = session.scalar(select(PackageRow.digest).where(PackageRow.digest == digest)) is not None
            if found:
                session.execute(update(PackageRow).where(PackageRow.digest == digest).values(created=time.time()))
            return found

    def put_package(self, digest: str, data: bytes) -> None:
        """Store a code package."""
        with self.session() as session, session.begin():
            session.merge(PackageRow(digest=digest, data=data, created=time.time()))

    def used_on_nodes(self) -> UsedOnNodes:
        """Return what the stored versions, which can be started, use on nodes."""
        with self.session() as session:
            rows = session.execute(select(VersionRow.model, VersionRow.spec)).all()
        return UsedOnNodes(
            models=frozenset(model for model, _ in rows),
            packages=frozenset(package for _, spec in rows if (package := _package_of(spec))),
            requirements=frozenset(_requirements_of(spec) for _, spec in rows),
        )

    def disconnect(self) -> None:
        """Close the connections. The next call opens new ones, and updates the tables again."""
        with self._migration:
            self._migrated = False
            self._engine.dispose()

    def close(self) -> None:
        """Wait for the work that was given to `run` and `submit`, and close the connections."""
        self._thread.close()
        self._engine.dispose()


def _last_number(session: Session, model: str) -> int:
    numbers = session.scalars(select(VersionRow.number).where(VersionRow.model == model))
    row = session.get(NumberRow, model)
    return max(row.last if row else 0, max(numbers, default=0))


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


def _requirements_of(spec: str) -> tuple[str, ...]:
    try:
        return tuple(map(str, json.loads(spec)["requirements"]))
    except (KeyError, TypeError, ValueError):  # a version that cannot be read cannot be started
        return ()


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
