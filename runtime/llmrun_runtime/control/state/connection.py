"""Connects to control's database, with timeouts: a database that does not respond becomes an error."""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

BUSY_TIMEOUT_S = 12
"""How long a statement waits for another writer (SQLite), or runs (PostgreSQL)."""
CONNECT_TIMEOUT_S = 10
LIBPQ_DRIVERS = ("psycopg", "psycopg2")
# Connections to a machine that is down end after about BUSY_TIMEOUT_S, used or not.
LIBPQ_OPTIONS: dict[str, Any] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "options": f"-c statement_timeout={BUSY_TIMEOUT_S}s",
    "tcp_user_timeout": BUSY_TIMEOUT_S * 1000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}


def make_engine(url: str) -> Engine:
    """Return an engine that has not connected yet. Raises ArgumentError, or ImportError if a driver is missing."""
    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")  # the driver of llmrun's extra `postgres`
    engine = create_engine(parsed, **engine_options(parsed))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
    return engine


def describe_error(error: SQLAlchemyError) -> str:
    """Return a database error's cause and what to do, in one line. SQLAlchemy's own text has the SQL and its values."""
    reason = first_line(error)
    if "disk is full" in reason or "No space left" in reason:
        return f"control cannot write its database: the disk is full ({reason}). Free space, then repeat the command"
    if "is locked" in reason:
        return (
            f"control cannot use its database: another process has locked it ({reason}). End that process, then retry"
        )
    return f"control cannot use its database: {reason}. Check LLMRUN_DATABASE_URL, and control.log for details"


def first_line(error: SQLAlchemyError) -> str:
    """Return the error's cause without the SQL and its values, and without what SQLAlchemy was doing."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    return str(cause or error).partition("\n")[0]


def engine_options(url: URL) -> dict[str, Any]:
    """Return SQLAlchemy's options for a database server: lost connections are noticed; calls have timeouts.

    Options in the URL's query take precedence.
    """
    if url.get_backend_name() == "sqlite":
        return {}
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.get_backend_name() == "postgresql" and url.get_driver_name() in LIBPQ_DRIVERS:
        options["connect_args"] = {key: value for key, value in LIBPQ_OPTIONS.items() if key not in url.query}
    return options


def _set_up_sqlite(connection: Any, _record: object) -> None:
    """Let readers continue during a write, save most fsyncs, and wait for other writers."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()
