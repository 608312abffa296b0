"""Download files: large ones in parallel parts, each part resumed where it stopped, every file checked on arrival.

Uses threads: receiving, writing and hashing all release the GIL. Memory is one chunk (1 MiB) per thread, whatever the
model's size.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmrun.errors import WeightsError
from llmrun_runtime.weights.cache.boot_id import boot_id
from llmrun_runtime.weights.cache.cache import discard_partial
from llmrun_runtime.weights.cache.digests import CHUNK_BYTES, Digester, mismatch
from llmrun_runtime.weights.pin import File
from llmrun_runtime.weights.stores.ranges import Reader, TransferError

PART_BYTES = 16 * 2**20
CONNECTIONS = 8
# A file that arrives damaged is downloaded once more.
ATTEMPTS = 2
_INDEX = struct.Struct("<I")


@dataclass(frozen=True)
class RetryPolicy:
    """How a part is retried. Waits double from the first to the longest."""

    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0
    stall_timeout_s: float = 120.0
    """The transfer fails once one of its parts has received no byte for this long."""


DEFAULT_RETRIES = RetryPolicy()


class DiskFullError(WeightsError):
    """The disk is full; the partial downloads were removed."""


@dataclass
class FileDownload:
    """The download of one file. `readers`: in order of preference."""

    file: File
    data: Path
    readers: list[Reader]
    peer_digests: dict[str, str] = field(default_factory=dict)
    """Another node's digests, for the bytes that other nodes send."""
    parts: int = 0
    data_fd: int = -1
    have: set[int] = field(default_factory=set)
    journal_fd: int = -1
    attempt: int = 1
    hasher: threading.Thread | None = None

    @property
    def journal_path(self) -> Path:
        """The file that lists the received parts: the boot id on a line, then part numbers of four bytes each."""
        return self.data.with_suffix(".parts")

    @property
    def digests(self) -> dict[str, str]:
        """The digests to check: the pin's; another node's only where the pin has none."""
        return self.file.digests or self.peer_digests

    def span(self, part: int) -> tuple[int, int]:
        """The part's first byte, and the byte after its last."""
        return part * PART_BYTES, min(self.file.size, (part + 1) * PART_BYTES)


class Transfer:
    """Runs `downloads` in their order.

    `on_bytes(count)` counts received bytes; `on_file(download, digests)` gets each complete, checked file.
    Both are called from the transfer's threads, one call at a time.
    """

    def __init__(
        self,
        downloads: Sequence[FileDownload],
        on_bytes: Callable[[int], None],
        on_file: Callable[[FileDownload, dict[str, str]], None],
        retries: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        self._downloads = list(downloads)
        self._on_bytes = on_bytes
        self._on_file = on_file
        self._retries = retries
        self._lock = threading.Condition()
        self._queue: collections.deque[tuple[FileDownload, int]] = collections.deque()
        self._unfinished = len(self._downloads)
        self._error: BaseException | None = None

    def run(self) -> None:
        """Return when all files are complete.

        Raises WeightsError; the received parts of large files are kept for the next run, unless the disk is full.
        """
        try:
            for download in self._downloads:
                self._enqueue(download)
            threads = [threading.Thread(target=self._work, daemon=True) for _ in range(CONNECTIONS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for download in self._downloads:
                if download.hasher:
                    download.hasher.join()
        finally:
            for download in self._downloads:
                self._close(download)
                if download.parts <= 1:  # already moved away if complete
                    download.data.unlink(missing_ok=True)
        if isinstance(self._error, OSError):
            text = f"writing to {self._downloads[0].data.parent} failed: {self._error.strerror}"
            if self._error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise WeightsError(text) from None
            for download in self._downloads:
                discard_partial(download.data)
            raise DiskFullError(f"{text}. The partial download was removed: free disk space, and try again") from None
        if self._error:
            raise self._error

    def _enqueue(self, download: FileDownload) -> None:
        """Queue the parts that are missing from an earlier transfer."""
        download.parts = -(-download.file.size // PART_BYTES)
        download.data.parent.mkdir(parents=True, exist_ok=True)
        if download.parts > 1 and download.data.exists():
            with contextlib.suppress(FileNotFoundError):
                boot, _, numbers = download.journal_path.read_bytes().partition(b"\n")
                whole = len(numbers) // _INDEX.size * _INDEX.size
                if boot.decode() == boot_id():  # otherwise the parts may never have reached the disk
                    download.have = {n for (n,) in _INDEX.iter_unpack(numbers[:whole]) if n < download.parts}
        for part in download.have:
            start, end = download.span(part)
            self._on_bytes(end - start)
        missing = [part for part in range(download.parts) if part not in download.have]
        # An empty file, and one that only needs hashing, need a thread too.
        self._queue.extend((download, part) for part in missing or [-1])

    def _prepare(self, download: FileDownload) -> None:
        """Open its files on first use, as there may be thousands. Called with the lock held."""
        if download.data_fd >= 0:
            return
        download.data_fd = os.open(download.data, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(download.data_fd, download.file.size)
        if download.parts > 1:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if download.have else os.O_TRUNC)
            download.journal_fd = os.open(download.journal_path, flags, 0o600)
            if not download.have:
                os.write(download.journal_fd, boot_id().encode() + b"\n")
            download.hasher = threading.Thread(target=self._guarded, args=(self._hash, download), daemon=True)
            download.hasher.start()

    def _close(self, download: FileDownload) -> None:
        for fd in (download.data_fd, download.journal_fd):
            if fd >= 0:
                os.close(fd)
        download.data_fd = download.journal_fd = -1

    def _guarded(self, work: Callable[[FileDownload], None], download: FileDownload) -> None:
        try:
            work(download)
        except BaseException as error:  # noqa: BLE001 - `run` raises it again
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._lock.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or not self._unfinished or self._error)
                if not self._unfinished or self._error:
                    return
                download, part = self._queue.popleft()
                try:
                    self._prepare(download)
                except OSError as error:
                    self._error = error
                    self._lock.notify_all()
                    return
            self._guarded(lambda download, part=part: self._fetch_part(download, part), download)  # type: ignore[misc]

    def _fetch_part(self, download: FileDownload, part: int) -> None:
        """Fetch one part; a file of one part is hashed as it arrives."""
        if download.parts <= 1:
            digester = Digester(download.digests, download.file.size)
            if not download.parts or self._receive(download, 0, digester):
                self._finish(download, digester.digests())
        elif part >= 0 and self._receive(download, part, None):
            os.write(download.journal_fd, _INDEX.pack(part))
            with self._lock:
                download.have.add(part)
                self._lock.notify_all()

    def _receive(self, download: FileDownload, part: int, digester: Digester | None) -> bool:
        """Write a part's bytes; retries continue where the last response stopped. Raises WeightsError.

        Return False, with the part incomplete, if the transfer has failed elsewhere.
        """
        at, end = download.span(part)
        wait, last_byte_at = self._retries.first_wait_s, time.monotonic()
        while at < end:
            reader = download.readers[0]
            try:
                for chunk in reader.read(download.file, at, end):
                    written = 0
                    while written < len(chunk):
                        written += os.pwrite(download.data_fd, memoryview(chunk)[written:], at + written)
                    if digester:
                        digester.update(chunk)
                    at += len(chunk)
                    wait, last_byte_at = self._retries.first_wait_s, time.monotonic()
                    with self._lock:
                        self._on_bytes(len(chunk))
                        if self._error:
                            return False
            except (TransferError, WeightsError) as error:
                if self._use_next_reader(download, reader):
                    continue
                if isinstance(error, WeightsError):
                    raise
                if time.monotonic() - last_byte_at > self._retries.stall_timeout_s:
                    raise WeightsError(
                        f"{download.file.name} from {reader.name} timed out after {self._retries.stall_timeout_s:g} s "
                        f"without data: {error}. Try again; the received parts are kept"
                    ) from None
                pause = max(wait * random.uniform(0.5, 1), error.retry_after)
                wait = min(2 * wait, self._retries.longest_wait_s)
                with self._lock:
                    self._lock.wait_for(lambda: self._error, pause)
                    if self._error:
                        return False
        return True

    def _use_next_reader(self, download: FileDownload, failed: Reader) -> bool:
        """Switch to the next reader that has the file; False if there is none."""
        with self._lock:
            if download.readers[0] is failed and len(download.readers) > 1:
                del download.readers[0]
                return True
            return download.readers[0] is not failed

    def _hash(self, download: FileDownload) -> None:
        """Hash a large file's parts in order as they arrive, from the page cache; then check the digests."""
        digester = Digester(download.digests, download.file.size)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for part in range(download.parts):
            with self._lock:
                self._lock.wait_for(lambda part=part: part in download.have or self._error)  # type: ignore[misc]
                if self._error:
                    return
            at, end = download.span(part)
            while at < end:
                count = os.preadv(download.data_fd, [buffer[: min(CHUNK_BYTES, end - at)]], at)
                digester.update(buffer[:count])
                at += count
        self._finish(download, digester.digests())

    def _finish(self, download: FileDownload, digests: dict[str, str]) -> None:
        with self._lock:
            if self._error:
                return
            not_md5 = any(download.file.name in reader.not_md5 for reader in download.readers)
            expected = {k: v for k, v in download.digests.items() if not (not_md5 and k == "md5")}
            difference = mismatch(digests, expected)
            if not difference:
                self._close(download)
                download.journal_path.unlink(missing_ok=True)
                self._on_file(download, digests)
                self._unfinished -= 1
                self._lock.notify_all()
                return
        if download.attempt == ATTEMPTS and len(download.readers) == 1:
            discard_partial(download.data)
            raise WeightsError(
                f"{download.file.name} from {download.readers[0].name} arrived damaged {ATTEMPTS} times: "
                f"its {difference}. Upload the file again"
            )
        with self._lock:
            self._close(download)
            discard_partial(download.data)
            self._on_bytes(-download.file.size)
            download.have = set()
            if len(download.readers) > 1:  # another node's copy may be the damaged one
                del download.readers[0]
            else:
                download.attempt += 1
            if len(download.readers) == 1:  # from here on, every byte is the last reader's
                download.peer_digests = {}
            self._queue.extend((download, part) for part in (range(download.parts) or [-1]))
            self._lock.notify_all()
