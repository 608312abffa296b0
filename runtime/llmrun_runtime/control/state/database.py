"""What should run, stored: apps, models, their versions and code packages. SQLite, or any SQLAlchemy URL.

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
    ModelRow,
    NumberRow,
    PackageRow,
    PinRow,
    StartRow,
    VersionRow,
)
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.pin import Pin

PACKAGE_GRACE_S = 3600
KEEP_STARTS = 1000  # of each model


class Database:
    """The tables, behind what control asks of them."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        Base.metadata.create_all(self._engine)

    def session(self) -> Session:
        """A transaction for a room with tables of its own: `with database.session() as session, session.begin()`."""
        return Session(self._engine)

    def load(self) -> tuple[dict[str, Deployed], dict[str, str]]:
        """Models in force by name, and apps' sources by app."""
        with Session(self._engine) as session:
            of_version = (PinRow.model == VersionRow.model) & (PinRow.number == VersionRow.number)
            in_force = (VersionRow.model == ModelRow.name) & (VersionRow.number == ModelRow.version)
            query = (
                select(ModelRow, VersionRow, PinRow.pin)
                .join(VersionRow, in_force)
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
        """The number for the model's next version; those of failed and of deleted ones are not used again."""
        with Session(self._engine) as session:
            return _last_number(session, model) + 1

    def put_version(self, deployed: Deployed, *, in_force: bool) -> None:
        """Store a version, and put it in force if so asked."""
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
            if in_force:
                session.merge(ModelRow(name=deployed.name, app=deployed.app, version=deployed.version))

    def put_app(self, name: str, source: str) -> None:
        """Store where an app was deployed from."""
        with Session(self._engine) as session, session.begin():
            session.merge(AppRow(name=name, source=source))

    def remove(self, models: Iterable[str]) -> None:
        """Remove models with their versions, apps that have none left, and packages that no version names.

        A package of the last PACKAGE_GRACE_S may belong to a deploy that is under way, and stays.
        """
        with Session(self._engine) as session, session.begin():
            for name in models:
                session.merge(NumberRow(model=name, last=_last_number(session, name)))
                session.execute(delete(ModelRow).where(ModelRow.name == name))
                session.execute(delete(VersionRow).where(VersionRow.model == name))
                session.execute(delete(PinRow).where(PinRow.model == name))
                session.execute(delete(AdaptersRow).where(AdaptersRow.model == name))
                session.execute(delete(StartRow).where(StartRow.model == name))
            session.execute(delete(AppRow).where(AppRow.name.not_in(select(ModelRow.app))))
            specs = (json.loads(spec) for spec in session.scalars(select(VersionRow.spec)))
            used = {spec["code"]["package"] for spec in specs if spec["code"]}
            old = PackageRow.created < time.time() - PACKAGE_GRACE_S
            session.execute(delete(PackageRow).where(PackageRow.digest.not_in(used), old))

    def put_start(self, start: ColdStart) -> None:
        """Note a cold start; the oldest of the model's beyond KEEP_STARTS are forgotten."""
        with Session(self._engine) as session, session.begin():
            session.add(StartRow(model=start.model, asked=start.asked, start=start.model_dump_json()))
            of_model = select(StartRow.id).where(StartRow.model == start.model).order_by(StartRow.id.desc())
            old = session.scalars(of_model.offset(KEEP_STARTS)).all()
            session.execute(delete(StartRow).where(StartRow.id.in_(old)))

    def starts(self, model: str, most: int = 10) -> list[ColdStart]:
        """The last cold starts of a model, the newest first."""
        with Session(self._engine) as session:
            rows = select(StartRow.start).where(StartRow.model == model).order_by(StartRow.id.desc()).limit(most)
            return [ColdStart.model_validate_json(row) for row in session.scalars(rows)]

    def package(self, digest: str) -> bytes | None:
        """A code package; None if it is not here."""
        with Session(self._engine) as session:
            row = session.get(PackageRow, digest)
            return row.data if row else None

    def has_package(self, digest: str) -> bool:
        """Whether a code package is here."""
        with Session(self._engine) as session:
            return session.scalar(select(PackageRow.digest).where(PackageRow.digest == digest)) is not None

    def put_package(self, digest: str, data: bytes) -> None:
        """Store a code package."""
        with Session(self._engine) as session, session.begin():
            session.merge(PackageRow(digest=digest, data=data, created=time.time()))

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()


def _last_number(session: Session, model: str) -> int:
    numbers = session.scalars(select(VersionRow.number).where(VersionRow.model == model))
    row = session.get(NumberRow, model)
    return max(row.last if row else 0, max(numbers, default=0))
