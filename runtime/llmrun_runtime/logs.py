"""The log files of a node: one per replica, with its engine's and shim's lines, and control's and the ingress's."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gzip
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

# Of control's log, and of each ingress's: a day of 100 requests per second is 1.2 GiB, or 0.3 GiB compressed.
LOG_BYTES, KEEP_COMPRESSED_BYTES = 64 * 2**20, 512 * 2**20
KEEP_FILES = 20  # per model and node
KEEP_DELETED_S = 7 * 86400.0
READ_BYTES = 2**20
# An engine writes to its log for as long as it runs.
MAX_BYTES, KEEP_BYTES = 64 * 2**20, 8 * 2**20
TRIM_S = 60.0

log = logging.getLogger("llmrun")


def log_to_file(root: Path, name: str) -> None:
    """Write this process's log to `logs/NAME.log` in the home."""
    (root / "logs").mkdir(parents=True, exist_ok=True)
    handler = CompressedLog(root / "logs" / f"{name}.log", LOG_BYTES, KEEP_COMPRESSED_BYTES)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", handlers=[handler], force=True
    )


class CompressedLog(RotatingFileHandler):
    """A log that becomes `NAME.log-TIME.gz` at `max_bytes`. The oldest of these are removed above `keep_bytes`.

    A thread compresses them, so that no request waits for that.
    """

    def __init__(self, path: Path, max_bytes: int, keep_bytes: int) -> None:
        super().__init__(path, maxBytes=max_bytes)
        self._path = path
        self._keep_bytes = keep_bytes
        self._compressing = threading.Lock()
        self._start_compression()  # of what an earlier process left

    def doRollover(self) -> None:
        """Start a new file."""
        self.close()
        now = time.time_ns()
        seconds, rest = divmod(now, 10**9)
        self._path.rename(f"{self._path}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}.{rest:09}")
        self.stream = self._open()
        self._start_compression()

    def _start_compression(self) -> None:
        threading.Thread(target=self._compress, name="compress-log", daemon=True).start()

    def _compress(self) -> None:
        with self._compressing:
            try:
                for path in self._rotated():
                    if path.suffix != ".gz":
                        _gzip(path)
            except OSError as error:  # a full disk
                log.warning("cannot compress %s, retrying with the next file: %s", self._path, error)
            sizes = {path: path.stat().st_size for path in self._rotated()}
            for path in list(sizes)[:-1]:
                if sum(sizes.values()) > self._keep_bytes:
                    path.unlink()
                    del sizes[path]

    def _rotated(self) -> list[Path]:
        """The rotated files, the oldest first."""
        return sorted(self._path.parent.glob(f"{self._path.name}-*"))


def read_compressed(path: Path) -> Iterator[str]:
    """Yield the lines of a CompressedLog, the oldest first, also while a thread compresses its files. Blocks."""
    names = {each.name.removesuffix(".gz") for each in path.parent.glob(f"{path.name}-*")}
    for name in [*sorted(names), path.name]:
        try:
            with _opened(path.with_name(name)) as file:
                yield from file
        except FileNotFoundError:
            continue  # above `keep_bytes`, or nothing is written yet
        except (EOFError, gzip.BadGzipFile) as error:  # the machine lost its power
            log.warning("cannot read %s: %s", path.with_name(name), error)


def _opened(path: Path) -> IO[str]:
    try:
        return path.open(errors="replace")
    except FileNotFoundError:  # its compressed copy was complete before it was removed
        return gzip.open(f"{path}.gz", "rt", errors="replace")


def _gzip(path: Path) -> None:
    """Replace a file by its compressed copy. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with path.open("rb") as file, gzip.open(partial, "wb", compresslevel=6) as compressed:
            shutil.copyfileobj(file, compressed)
        partial.rename(f"{path}.gz")
        path.unlink()
    finally:
        partial.unlink(missing_ok=True)


def model_logs(root: Path) -> Path:
    """The folder of all models' logs in a home. The folder above it has only logs of Ray and of the cluster."""
    return root / "logs" / "models"


def log_path(root: Path, model: str, version: int, replica: str) -> Path:
    """The log file of one replica. Removes the model's oldest logs above KEEP_FILES, but none of a running engine."""
    folder = model_logs(root) / model
    for old in _by_age(folder)[: -(KEEP_FILES - 1)]:
        if not _is_in_use(old):
            old.unlink(missing_ok=True)
    return folder / f"v{version}-{replica[:12]}.log"


def read_logs(root: Path, model: str, offsets: dict[str, int], tail: int) -> dict[str, tuple[int, str]]:
    """The new text of each of the model's logs on this node: file name → (offset after the text, text).

    A file that is not in `offsets` starts at its last `tail` lines; a file that has become smaller than its offset
    starts at 0. At most READ_BYTES per file and call.
    """
    texts: dict[str, tuple[int, str]] = {}
    for path in _by_age(model_logs(root) / model):
        with contextlib.suppress(FileNotFoundError):  # it has been removed
            offset = offsets.get(path.name)
            end, chunk = _last_lines(path, tail) if offset is None else _chunk(path, offset)
            texts[path.name] = (end, chunk.decode(errors="replace"))
    return texts


def _last_lines(path: Path, tail: int) -> tuple[int, bytes]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - READ_BYTES))
        lines = file.read(size - start).splitlines(keepends=True)
    return size, b"".join(lines[-tail:]) if tail else b""


def _chunk(path: Path, offset: int) -> tuple[int, bytes]:
    with path.open("rb") as file:
        start = file.seek(offset if offset <= file.seek(0, os.SEEK_END) else 0)
        chunk = file.read(READ_BYTES)
    return start + len(chunk), chunk


async def trim_periodically(root: Path) -> None:
    """Trim the models' logs every TRIM_S. Never returns."""
    while True:
        try:
            await asyncio.to_thread(trim_logs, root)
        except OSError as error:  # a full disk
            log.warning("cannot trim the logs: %s", error)
        await asyncio.sleep(TRIM_S)


def trim_logs(root: Path) -> None:
    """Reduce every model's log above MAX_BYTES to its last KEEP_BYTES. Raises OSError.

    The file stays the same one, because its engine holds it open. A line written at that moment can be lost.
    """
    for path in model_logs(root).rglob("*.log"):
        with contextlib.suppress(FileNotFoundError):  # it has been removed
            if path.stat().st_size <= MAX_BYTES:
                continue
            with path.open("rb") as old, path.open("ab") as file:
                old.seek(-KEEP_BYTES, os.SEEK_END)
                kept = old.read(KEEP_BYTES)
                file.truncate(0)  # engines append, so their next line follows
                file.write(b"[llmrun] the log was too large: older lines were removed\n" + kept)


def remove_logs(root: Path, models: Collection[str], now: float) -> None:
    """Remove the logs of all other models once the last line is KEEP_DELETED_S old. `now` is Unix time."""
    folder = model_logs(root)
    for path in list(folder.rglob("*.log")):
        with contextlib.suppress(FileNotFoundError):  # it has been removed
            model = path.parent.relative_to(folder).as_posix()
            is_old = now - path.stat().st_mtime > KEEP_DELETED_S
            if model not in models and is_old and not _is_in_use(path):
                path.unlink()
                with contextlib.suppress(OSError):  # it has other logs
                    path.parent.rmdir()


def mark_in_use(file: IO[bytes]) -> None:
    """Keep an open log from removal until each process that inherits the open file has exited."""
    with contextlib.suppress(OSError):  # not every network filesystem has locks
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _is_in_use(path: Path) -> bool:
    """Whether a process has the file open that `mark_in_use` was called for."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _by_age(folder: Path) -> list[Path]:
    """The logs in a folder, the one that was written last at the end."""
    times: dict[Path, float] = {}
    for path in folder.glob("*.log"):
        with contextlib.suppress(FileNotFoundError):  # it has been removed
            times[path] = path.stat().st_mtime
    return sorted(times, key=lambda path: times[path])


def write_log(path: Path, text: str) -> None:
    """Append a line of llmrun to an engine's log. Raises OSError."""
    with path.open("a") as file:
        file.write(f"[llmrun] {time.strftime('%H:%M:%S')} {text}\n")
