"""The thread in which control uses its database, so that a slow or locked one delays nothing else."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from llmrun_runtime.control.state.connection import first_line

log = logging.getLogger("llmrun.control")
# Longer than a statement may take (`connection.BUSY_TIMEOUT_S`), so that its own error arrives first.
CALL_TIMEOUT_S = 15.0
MAX_PENDING = 200
P = ParamSpec("P")
T = TypeVar("T")


class DatabaseTimeout(SQLAlchemyError):
    """The database did not respond in time."""


class DatabaseThread:
    """Runs work in one thread, in the order in which it was given."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._lock = threading.Lock()
        self._pending = 0
        self._current = threading.local()
        self._last_error = ("", 0.0)
        """What work failed with last, and when (monotonic). It explains why the work behind it waits."""

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` and return its result.

        Raises DatabaseTimeout after CALL_TIMEOUT_S; the work is then not started or, if possible, not committed.
        """
        given_up = threading.Event()
        future = self._start(given_up, lambda: work(*args, **kwargs))
        result = asyncio.wrap_future(future)
        done, _ = await asyncio.wait([result], timeout=CALL_TIMEOUT_S)
        if not done:
            given_up.set()
            result.cancel()
            raise DatabaseTimeout(f"no response within {CALL_TIMEOUT_S:g} s{self._recent_error()}")
        return result.result()

    def submit(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Start `work` and do not wait for it. Logs an error."""

        def log_error(future: Future[object]) -> None:
            if error := future.exception():
                log.error("database error in %s", getattr(work, "__qualname__", work), exc_info=error)

        try:
            self._start(threading.Event(), lambda: work(*args, **kwargs)).add_done_callback(log_error)
        except DatabaseTimeout as error:
            log.error("database error: %s", error)  # noqa: TRY400 # its traceback says nothing

    def check_not_given_up(self) -> None:
        """Raise DatabaseTimeout in the thread if the caller of the current work no longer waits for it."""
        given_up: threading.Event | None = getattr(self._current, "given_up", None)
        if given_up and given_up.is_set():
            raise DatabaseTimeout("the caller no longer waits")

    def _start(self, given_up: threading.Event, work: Callable[[], T]) -> Future[T]:
        with self._lock:
            if self._pending >= MAX_PENDING:
                raise DatabaseTimeout(f"no response, and {MAX_PENDING} calls wait for it")
            self._pending += 1
        return self._executor.submit(self._work, given_up, work)

    def _work(self, given_up: threading.Event, work: Callable[[], T]) -> T:
        with self._lock:
            self._pending -= 1
        self._current.given_up = given_up
        try:
            self.check_not_given_up()
            result = work()
        except DatabaseTimeout:
            raise
        except SQLAlchemyError as error:
            self._last_error = (first_line(error), time.monotonic())
            raise
        else:
            return result
        finally:
            self._current.given_up = None

    def _recent_error(self) -> str:
        """Return the last error if it can be the reason for a timeout now.

        A success in between does not matter: a locked SQLite file can still be read.
        """
        error, when = self._last_error
        return f" (before that: {error})" if error and time.monotonic() - when < CALL_TIMEOUT_S else ""

    def close(self) -> None:
        """Wait for all work, and accept no more."""
        self._executor.shutdown()
