"""Brings files: large ones in parts, side by side; each resumed where it stopped, checked as it arrives.

Threads, because all the work (receiving, writing, hashing) is done outside of Python's lock. Memory is one piece of a
file (1 MiB) per thread, whatever the model's size.
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
from llmrun_runtime.weights.cache.cache import discard
from llmrun_runtime.weights.cache.digests import CHUNK_BYTES, Digester, mismatch
from llmrun_runtime.weights.pin import File
from llmrun_runtime.weights.stores.ranges import Reader, TransferError

PART_BYTES = 16 * 2**20
CONNECTIONS = 8
# So long no byte comes of a part, and it is asked for again and again; then the transfer ends.
PATIENCE_S = 120.0
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
# A file that arrives damaged is fetched once more.
ATTEMPTS = 2
_INDEX = struct.Struct("<I")


class DiskFull(WeightsError):
    """There was no room for all of it; what had come is gone."""


@dataclass
class Job:
    """One file on its way. `readers`: who has it, in order of preference."""

    file: File
    data: Path
    readers: list[Reader]
    parts: int = 0
    handle: int = -1
    have: set[int] = field(default_factory=set)
    journal: int = -1
    attempt: int = 1
    hashing: threading.Thread | None = None

    @property
    def journal_path(self) -> Path:
        """Which parts of `data` have come: the boot in which they came, a line; then their numbers, four bytes each."""
        return self.data.with_suffix(".parts")

    def span(self, part: int) -> tuple[int, int]:
        """The part's first byte, and the one after its last."""
        return part * PART_BYTES, min(self.file.size, (part + 1) * PART_BYTES)


class Transfer:
    """Brings `jobs`, in their order. `came(bytes)` counts; `done(job, digests)` takes a file that is complete.

    Both are called from the transfer's threads, one at a time.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        came: Callable[[int], None],
        done: Callable[[Job, dict[str, str]], None],
        patience: float = PATIENCE_S,
    ) -> None:
        self._jobs = list(jobs)
        self._came = came
        self._done = done
        self._patience = patience
        self._lock = threading.Condition()
        self._queue: collections.deque[tuple[Job, int]] = collections.deque()
        self._left = len(self._jobs)
        self._error: BaseException | None = None

    def run(self) -> None:
        """Return when all files are done. Raises WeightsError; what came of large files is kept for the next time,
        unless the disk is full."""
        try:
            for job in self._jobs:
                self._open(job)
            threads = [threading.Thread(target=self._work, daemon=True) for _ in range(CONNECTIONS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for job in self._jobs:
                if job.hashing:
                    job.hashing.join()
        finally:
            for job in self._jobs:
                self._close(job)
                if job.parts <= 1:  # moved away, if it is complete
                    job.data.unlink(missing_ok=True)
        if isinstance(self._error, OSError):
            said = f"writing to {self._jobs[0].data.parent} failed: {self._error.strerror}"
            if self._error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise WeightsError(said) from None
            for job in self._jobs:
                discard(job.data)
            raise DiskFull(f"{said}; what had come was removed: make room, and run it again") from None
        if self._error:
            raise self._error

    def _open(self, job: Job) -> None:
        """Take up what an earlier transfer left of it."""
        job.parts = -(-job.file.size // PART_BYTES)
        job.data.parent.mkdir(parents=True, exist_ok=True)
        if job.parts > 1 and job.data.exists():
            with contextlib.suppress(FileNotFoundError):
                boot, _, numbers = job.journal_path.read_bytes().partition(b"\n")
                whole = len(numbers) // _INDEX.size * _INDEX.size
                if boot.decode() == boot_id():  # else what it names may never have reached the disk
                    job.have = {n for (n,) in _INDEX.iter_unpack(numbers[:whole]) if n < job.parts}
        for part in job.have:
            start, end = job.span(part)
            self._came(end - start)
        missing = [part for part in range(job.parts) if part not in job.have]
        # An empty file and one that only has to be hashed need a thread, too.
        self._queue.extend((job, part) for part in missing or [-1])

    def _prepare(self, job: Job) -> None:
        """Open its files when it is first worked on: there may be thousands. Called with the lock held."""
        if job.handle >= 0:
            return
        job.handle = os.open(job.data, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(job.handle, job.file.size)
        if job.parts > 1:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if job.have else os.O_TRUNC)
            job.journal = os.open(job.journal_path, flags, 0o600)
            if not job.have:
                os.write(job.journal, boot_id().encode() + b"\n")
            job.hashing = threading.Thread(target=self._guarded, args=(self._hash, job), daemon=True)
            job.hashing.start()

    def _close(self, job: Job) -> None:
        for handle in (job.handle, job.journal):
            if handle >= 0:
                os.close(handle)
        job.handle = job.journal = -1

    def _guarded(self, work: Callable[[Job], None], job: Job) -> None:
        try:
            work(job)
        except BaseException as error:  # noqa: BLE001 - raised again by `run`
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._lock.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or not self._left or self._error)
                if not self._left or self._error:
                    return
                job, part = self._queue.popleft()
                try:
                    self._prepare(job)
                except OSError as error:
                    self._error = error
                    self._lock.notify_all()
                    return
            self._guarded(lambda job, part=part: self._bring(job, part), job)  # type: ignore[misc]

    def _bring(self, job: Job, part: int) -> None:
        """One part; a file of one part is hashed as it comes."""
        if job.parts <= 1:
            digester = Digester(job.file.digests, job.file.size)
            if not job.parts or self._receive(job, 0, digester):
                self._finish(job, digester.digests())
        elif part >= 0 and self._receive(job, part, None):
            os.write(job.journal, _INDEX.pack(part))
            with self._lock:
                job.have.add(part)
                self._lock.notify_all()

    def _receive(self, job: Job, part: int, digester: Digester | None) -> bool:
        """Write a part's bytes, asking again from where an answer broke off. Raises WeightsError.

        False, with only some of it written, if the transfer has failed elsewhere.
        """
        at, end = job.span(part)
        wait, quiet_since = FIRST_WAIT_S, time.monotonic()
        while at < end:
            reader = job.readers[0]
            try:
                for piece in reader.read(job.file, at, end):
                    written = 0
                    while written < len(piece):
                        written += os.pwrite(job.handle, memoryview(piece)[written:], at + written)
                    if digester:
                        digester.update(piece)
                    at += len(piece)
                    wait, quiet_since = FIRST_WAIT_S, time.monotonic()
                    with self._lock:
                        self._came(len(piece))
                        if self._error:
                            return False
            except (TransferError, WeightsError) as error:
                if self._next_reader(job, reader):
                    continue
                if isinstance(error, WeightsError):
                    raise
                if time.monotonic() - quiet_since > self._patience:
                    raise WeightsError(
                        f"{job.file.name} from {reader.name}: {error}, for {self._patience:g} s; "
                        f"run it again, what has come is kept"
                    ) from None
                pause = max(wait * random.uniform(0.5, 1), error.after)
                wait = min(2 * wait, LONGEST_WAIT_S)
                with self._lock:
                    self._lock.wait_for(lambda: self._error, pause)
                    if self._error:
                        return False
        return True

    def _next_reader(self, job: Job, failed: Reader) -> bool:
        """Go on with the next that has it; False if there is none."""
        with self._lock:
            if job.readers[0] is failed and len(job.readers) > 1:
                del job.readers[0]
                return True
            return job.readers[0] is not failed

    def _hash(self, job: Job) -> None:
        """Follow the parts of a large file from its beginning, out of the page cache; then judge it."""
        digester = Digester(job.file.digests, job.file.size)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for part in range(job.parts):
            with self._lock:
                self._lock.wait_for(lambda part=part: part in job.have or self._error)  # type: ignore[misc]
                if self._error:
                    return
            at, end = job.span(part)
            while at < end:
                count = os.preadv(job.handle, [buffer[: min(CHUNK_BYTES, end - at)]], at)
                digester.update(buffer[:count])
                at += count
        self._finish(job, digester.digests())

    def _finish(self, job: Job, digests: dict[str, str]) -> None:
        with self._lock:
            if self._error:
                return
            unnamed = any(job.file.name in reader.unnamed for reader in job.readers)
            known = {k: v for k, v in job.file.digests.items() if not (unnamed and k == "md5")}
            difference = mismatch(digests, known)
            if not difference:
                self._close(job)
                job.journal_path.unlink(missing_ok=True)
                self._done(job, digests)
                self._left -= 1
                self._lock.notify_all()
                return
        if job.attempt == ATTEMPTS and len(job.readers) == 1:
            discard(job.data)
            raise WeightsError(
                f"{job.file.name} from {job.readers[0].name} arrived damaged {ATTEMPTS} times: its {difference}; "
                f"nothing of it is used: upload it again"
            )
        with self._lock:
            self._close(job)
            discard(job.data)
            self._came(-job.file.size)
            job.have = set()
            if len(job.readers) > 1:  # another node's copy may be the damaged one
                del job.readers[0]
            else:
                job.attempt += 1
            self._queue.extend((job, part) for part in (range(job.parts) or [-1]))
            self._lock.notify_all()
