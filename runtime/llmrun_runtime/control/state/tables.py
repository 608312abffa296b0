"""The tables of control's database."""

from __future__ import annotations

from sqlalchemy import BigInteger, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAME = String(63)  # a DNS label
ADAPTER = String(255)


class Base(DeclarativeBase):
    """The tables."""


class AppRow(Base):
    """An app and where it was last deployed from."""

    __tablename__ = "apps"
    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    source: Mapped[str] = mapped_column(Text)


class ModelRow(Base):
    """A model and the number of its version in force."""

    __tablename__ = "models"
    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    app: Mapped[str] = mapped_column(NAME)
    version: Mapped[int]


class VersionRow(Base):
    """One deployed spec. `engine_version` is the version whose replicas serve it (tuning starts none)."""

    __tablename__ = "versions"
    model: Mapped[str] = mapped_column(NAME, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    engine_version: Mapped[int]
    spec: Mapped[str] = mapped_column(Text)
    placement: Mapped[str] = mapped_column(Text)
    proven: Mapped[bool]
    created: Mapped[float]


class PinRow(Base):
    """What the weights' name of a version meant when it was deployed (a table of its own: it came later)."""

    __tablename__ = "pins"
    model: Mapped[str] = mapped_column(NAME, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    pin: Mapped[str] = mapped_column(Text(2**24))


class AdaptersRow(Base):
    """A model's adapters as they were last listed, and of which `lora=`."""

    __tablename__ = "adapters"
    model: Mapped[str] = mapped_column(NAME, primary_key=True)
    lora: Mapped[str] = mapped_column(Text)
    adapters: Mapped[str] = mapped_column(Text(2**24))


class NumberRow(Base):
    """The last version number of a model, deleted ones too: a number names an application, and is not used again."""

    __tablename__ = "numbers"
    model: Mapped[str] = mapped_column(NAME, primary_key=True)
    last: Mapped[int]


class StartRow(Base):
    """One cold start."""

    __tablename__ = "starts"
    id: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(NAME, index=True)
    asked: Mapped[float]
    start: Mapped[str] = mapped_column(Text)


class PackageRow(Base):
    """A code package, named by its sha256."""

    __tablename__ = "packages"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary(2**30))
    created: Mapped[float]


class KeyRow(Base):
    """An API key: what it may, and the sha256 of its secret."""

    __tablename__ = "keys"
    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    facts: Mapped[str] = mapped_column(Text)


class UsageRow(Base):
    """What was used on one day (UTC) of one model by one key; `""` is no key, and the base model."""

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
    """What of a living replica's counts is in `usage` already, so that nothing is counted twice."""

    __tablename__ = "counted"
    replica: Mapped[str] = mapped_column(String(64), primary_key=True)
    counts: Mapped[str] = mapped_column(Text)
