"""The tables of control's database. `migrations` has the rules for changes."""

from __future__ import annotations

from sqlalchemy import BigInteger, LargeBinary, String, Text
from sqlalchemy.dialects.mysql import MEDIUMTEXT
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAME = String(63)  # a DNS label
ADAPTER = String(255)
# MySQL's TEXT ends at 64 KiB. PostgreSQL's takes no length.
LONG_TEXT = Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")


class Base(DeclarativeBase):
    """The tables."""


class MetaRow(Base):
    """A fact about the database itself: its schema version, its cluster's id."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(NAME, primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class AppRow(Base):
    """An app and the source that it was last deployed from."""

    __tablename__ = "apps"
    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    source: Mapped[str] = mapped_column(Text)


class ModelRow(Base):
    """A model and the number of its active version."""

    __tablename__ = "models"
    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    app: Mapped[str] = mapped_column(NAME)
    version: Mapped[int]


class VersionRow(Base):
    """One deployed spec. `engine_version` is the version whose replicas serve it: a tuned version starts none."""

    __tablename__ = "versions"
    model: Mapped[str] = mapped_column(NAME, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    engine_version: Mapped[int]
    spec: Mapped[str] = mapped_column(Text)
    placement: Mapped[str] = mapped_column(Text)
    proven: Mapped[bool]
    created: Mapped[float]
    app: Mapped[str | None] = mapped_column(NAME)
    """None in rows of releases that did not store it."""
    cause: Mapped[str | None] = mapped_column(LONG_TEXT)
    """Why its proof failed."""


class PinRow(Base):
    """The pin of a version's weights. A separate table because it was added later."""

    __tablename__ = "pins"
    model: Mapped[str] = mapped_column(NAME, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    pin: Mapped[str] = mapped_column(LONG_TEXT)


class AdaptersRow(Base):
    """A model's adapters as last listed, and the `lora=` option that they were listed for."""

    __tablename__ = "adapters"
    model: Mapped[str] = mapped_column(NAME, primary_key=True)
    lora: Mapped[str] = mapped_column(Text)
    adapters: Mapped[str] = mapped_column(LONG_TEXT)


class NumberRow(Base):
    """A model's last version number. Kept after a delete: numbers are part of application names and not reused."""

    __tablename__ = "numbers"
    model: Mapped[str] = mapped_column(NAME, primary_key=True)
    last: Mapped[int]


class ColdStartRow(Base):
    """One cold start."""

    __tablename__ = "starts"
    id: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(NAME, index=True)
    asked: Mapped[float]
    start: Mapped[str] = mapped_column(Text)


class PackageRow(Base):
    """A code package. `digest` is its sha256."""

    __tablename__ = "packages"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary(2**30))
    created: Mapped[float]


class KeyRow(Base):
    """An API key: its permissions and limits, and the sha256 of its secret."""

    __tablename__ = "keys"
    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    facts: Mapped[str] = mapped_column(Text)


class UsageRow(Base):
    """The usage of one day (UTC), key, model and adapter. `""` stands for no key, and for the base model."""

    __tablename__ = "usage"
    day: Mapped[str] = mapped_column(String(10), primary_key=True)
    key: Mapped[str] = mapped_column(NAME, primary_key=True)
    model: Mapped[str] = mapped_column(NAME, primary_key=True)
    adapter: Mapped[str] = mapped_column(ADAPTER, primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger, default=0)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    completion_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    cached_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    gpu_seconds: Mapped[float] = mapped_column(default=0.0)


class CountedRow(Base):
    """The part of a live replica's counts that is in `usage` already, so that nothing is counted twice."""

    __tablename__ = "counted"
    replica: Mapped[str] = mapped_column(String(64), primary_key=True)
    counts: Mapped[str] = mapped_column(Text)
