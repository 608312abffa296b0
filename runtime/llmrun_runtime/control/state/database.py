"""Stores apps, models with their versions, code packages and cold starts. SQLite, or any SQLAlchemy URL.

Control is the only writer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

from sqlalchemy import create_engine, delete, select
from sqlalchemy.orm import Session

from llmrun.spec import ModelSpec
from llmrun.wire import ColdStart
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.control.state.tables import (
    AdaptersRow,
    AppRow,
    Base,
    ColdStartRow,
    ModelRow,
    NumberRow,
    PackageRow,
    PinRow,
    VersionRow,
)
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.pin import Pin

PACKAGE_GRACE_S = 3600
KEEP_COLD_STARTS = 1000  # per model


class Database:
    """Queries and transactions over the tables."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        Base.metadata.create_all(self._engine)

    def session(self) -> Session:
        """Open a session, for modules with their own tables: `with database.session() as session, session.begin()`."""
        return Session(self._engine)

    def load(self) -> tuple[dict[str, Deployed], dict[str, str]]:
        """Return the active versions by model name, and the apps' sources by app name."""
        with Session(self._engine) as session:
            of_version = (PinRow.model == VersionRow.model) & (PinRow.number == VersionRow.number)
            active_version = (VersionRow.model == ModelRow.name) & (VersionRow.number == ModelRow.version)
            query = (
                select(ModelRow, VersionRow, PinRow.pin)
                .join(VersionRow, active_version)
                .join(PinRow, of_version, isouter=True)
            )
            models = {
                model.name: Deployed(
                    app=model.app,
                    version=version.number,
                    engine_version=version.engine_version,
                    spec=ModelSpec.model_validate_json(version.spec),
                    placement=Placement(**json.loads(version.placement)),
                    proven=version.proven,
                    pin=Pin.model_validate_json(pin) if pin else None,
                    created=version.created,
                )
                for model, version, pin in session.execute(query)
            }
            return models, {row.name: row.source for row in session.scalars(select(AppRow))}

    def next_version(self, model: str) -> int:
        """Return the number for a model's next version. Numbers of failed and deleted versions are not reused."""
        with Session(self._engine) as session:
            return _last_number(session, model) + 1

    def put_version(self, deployed: Deployed, *, active: bool) -> None:
        """Store a version; `active` makes it the active one."""
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

    def put_app(self, name: str, source: str) -> None:
        """Store the source that an app was deployed from."""
        with Session(self._engine) as session, session.begin():
            session.merge(AppRow(name=name, source=source))

    def remove(self, models: Iterable[str]) -> None:
        """Remove models with their versions, apps without models, and packages that no version uses.

        Keeps packages newer than PACKAGE_GRACE_S: they may belong to a running deploy.
        """
        with Session(self._engine) as session, session.begin():
            for name in models:
                session.merge(NumberRow(model=name, last=_last_number(session, name)))
                session.execute(delete(ModelRow).where(ModelRow.name == name))
                session.execute(delete(VersionRow).where(VersionRow.model == name))
                session.execute(delete(PinRow).where(PinRow.model == name))
                session.execute(delete(AdaptersRow).where(AdaptersRow.model == name))
                session.execute(delete(ColdStartRow).where(ColdStartRow.model == name))
            session.execute(delete(AppRow).where(AppRow.name.not_in(select(ModelRow.app))))
            specs = (json.loads(spec) for spec in session.scalars(select(VersionRow.spec)))
            used = {spec["code"]["package"] for spec in specs if spec["code"]}
            old = PackageRow.created < time.time() - PACKAGE_GRACE_S
            session.execute(delete(PackageRow).where(PackageRow.digest.not_in(used), old))

    def put_cold_start(self, start: ColdStart) -> None:
        """Store a cold start, and delete the model's oldest ones beyond KEEP_COLD_STARTS."""
        with Session(self._engine) as session, session.begin():
            session.add(ColdStartRow(model=start.model, asked=start.asked, start=start.model_dump_json()))
            of_model = select(ColdStartRow.id).where(ColdStartRow.model == start.model).order_by(ColdStartRow.id.desc())
            old = session.scalars(of_model.offset(KEEP_COLD_STARTS)).all()
            session.execute(delete(ColdStartRow).where(ColdStartRow.id.in_(old)))

    def cold_starts(self, model: str, limit: int = 10) -> list[ColdStart]:
        """Return a model's last cold starts, newest first."""
        with Session(self._engine) as session:
            rows = (
                select(ColdStartRow.start)
                .where(ColdStartRow.model == model)
                .order_by(ColdStartRow.id.desc())
                .limit(limit)
            )
            return [ColdStart.model_validate_json(row) for row in session.scalars(rows)]

    def package(self, digest: str) -> bytes | None:
        """Return a code package; None if it is not stored."""
        with Session(self._engine) as session:
            row = session.get(PackageRow, digest)
            return row.data if row else None

    def has_package(self, digest: str) -> bool:
        """Whether a code package is stored."""
        with Session(self._engine) as session:
            return session.scalar(select(PackageRow.digest).where(PackageRow.digest == digest)) is not None

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
