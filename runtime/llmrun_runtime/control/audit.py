"""`logs/audit.log` on the head: a line of JSON for each change through llmrun's own API, by whom, and its result."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from llmrun.wire import AuditRow
from llmrun_runtime.logs import CompressedLog, read_compressed

LOG_BYTES, KEEP_COMPRESSED_BYTES = 16 * 2**20, 256 * 2**20
log = logging.getLogger("llmrun.control")


class AuditLog:
    """Writes and reads the file. A change is not refused because its line cannot be written: control's log says so."""

    def __init__(self, root: Path) -> None:
        self._path = root / "logs" / "audit.log"
        self._handler: CompressedLog | None = None
        self._lock = threading.Lock()

    def write(self, row: AuditRow) -> None:
        """Append a row. Blocks."""
        try:
            with self._lock:
                if self._handler is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._handler = CompressedLog(self._path, LOG_BYTES, KEEP_COMPRESSED_BYTES)
                line = logging.LogRecord("audit", logging.INFO, "", 0, row.model_dump_json(), None, None)
                if self._handler.shouldRollover(line):
                    self._handler.doRollover()
                assert self._handler.stream
                self._handler.stream.write(row.model_dump_json() + "\n")
                self._handler.stream.flush()
        except OSError as error:  # a full disk
            log.warning("cannot write to %s: %s. Not recorded: %s", self._path, error, row.model_dump_json())

    def close(self) -> None:
        """Close the file; the next row opens it again."""
        with self._lock:
            if self._handler:
                self._handler.close()
                self._handler = None

    def tail(self, count: int) -> list[AuditRow]:
        """Return the last rows, the oldest first. Blocks."""
        with self._lock:  # no file becomes another one meanwhile
            return list(deque(_rows(read_compressed(self._path)), maxlen=count))


def _rows(lines: Iterable[str]) -> Iterable[AuditRow]:
    for line in lines:
        try:
            yield AuditRow.model_validate_json(line)
        except ValidationError:
            continue  # cut off by a full disk
