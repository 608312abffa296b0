"""The weights that lie on a node: complete and checked, or not visible.

    blobs/ALGORITHM-DIGEST   a file, complete and checked; shared by all pins that have it
    models/PIN/NAME          links to blobs, or into the Hub's cache: what engines load
    manifests/PIN.json       written last: a folder without it is not complete
    partial/KEY              what has come of a large file, and which parts (transfer.py)

Knows no store. A manifest's time of change is when it was last used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from llmrun.errors import WeightsError
from llmrun.settings import Settings
from llmrun_runtime.weights.cache.boot_id import boot_id
from llmrun_runtime.weights.cache.digests import blob_name, digests_of, mismatch
from llmrun_runtime.weights.cache.locks import locked
from llmrun_runtime.weights.pin import File, Pin

# What is left free of a disk, for logs and databases.
SPARE_BYTES = 64 * 2**20


class ManifestEntry(BaseModel):
    """A file as it lies here."""

    size: int
    mtime_ns: int
    digests: dict[str, str]
    place: str
    """A blob's name, or the absolute path of a file of the Hub's cache."""

    @classmethod
    def of(cls, path: Path, digests: dict[str, str], place: str) -> ManifestEntry:
        """The file at `path` as it is now. Raises OSError."""
        stat = path.stat()
        return cls(size=stat.st_size, mtime_ns=stat.st_mtime_ns, digests=digests, place=place)

    def is_still(self, path: Path) -> bool:
        """Whether the file at `path` is there, with this size and time."""
        try:
            stat = path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


class Manifest(BaseModel):
    """A pin that is complete here."""

    pin: Pin
    made: float
    """When (Unix time) it was brought, or imported last."""
    entries: dict[str, ManifestEntry]
    boot: str
    """The boot in which it was written; empty once its bytes are known to be on the disk."""


def discard(data: Path) -> None:
    """Remove what has come of a file, and the journal of its parts (transfer.py)."""
    data.unlink(missing_ok=True)
    data.with_suffix(".parts").unlink(missing_ok=True)


def open_cache(settings: Settings) -> Cache:
    """This node's cache."""
    return Cache(settings.weights_root, settings.weights_max_bytes)


class Cache:
    """The folder `root`; `max_bytes` bounds its blobs (0: the disk does)."""

    def __init__(self, root: Path, max_bytes: int = 0) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.partial = root / "partial"
        self.blobs = root / "blobs"
        self._models = root / "models"
        self._manifests = root / "manifests"

    def folder(self, pin_id: str) -> Path:
        """Where an engine finds a complete pin."""
        return self._models / pin_id

    def lock(self, pin_id: str) -> Path:
        """The lock of whoever works on a pin."""
        return self.root / "locks" / f"{pin_id}.lock"

    def find(self, pin_id: str) -> Manifest | None:
        """A pin that is complete here, its files compared by size and time; None if it is not.

        Files that were not yet safe on the disk when the machine stopped are hashed once more.
        """
        manifest = self.load(pin_id)
        if manifest is None or not self.is_complete(manifest):
            return None
        if manifest.boot and manifest.boot != boot_id():
            if self.verify(manifest):
                return None
            self._write(manifest.model_copy(update={"boot": ""}))
        return manifest

    def is_complete(self, manifest: Manifest) -> bool:
        """Whether all its files are there, by size and time."""
        folder = self.folder(manifest.pin.id)
        return all(entry.is_still(folder / name) for name, entry in manifest.entries.items())

    def load(self, pin_id: str) -> Manifest | None:
        """A pin's manifest, whatever has become of its files."""
        return self._read(self._manifests / f"{pin_id}.json")

    def used(self, pin_id: str) -> None:
        """Note that it is used now."""
        with contextlib.suppress(FileNotFoundError):  # another process has just made room
            os.utime(self._manifests / f"{pin_id}.json")

    def manifests(self) -> Iterator[tuple[Manifest, float]]:
        """All complete pins, and when (Unix time) they were last used."""
        for path in sorted(self._manifests.glob("*.json")):
            manifest = self._read(path)
            with contextlib.suppress(FileNotFoundError):
                if manifest:
                    yield manifest, path.stat().st_mtime

    def held(self) -> int:
        """The bytes of all blobs."""
        found = 0
        for path in self.blobs.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                found += path.stat().st_size
        return found

    def is_whole(self, entry: ManifestEntry) -> bool:
        """Whether the file is there, with the size and the time it had."""
        return entry.is_still(self.where(entry))

    def where(self, entry: ManifestEntry) -> Path:
        """The file itself."""
        return self.blobs / entry.place  # an absolute place stays as it is

    def adopt(self, data: Path, file: File, digests: dict[str, str]) -> ManifestEntry:
        """Take in a file that has been checked against `digests`, by moving it."""
        digests = {**file.digests, **digests}
        blob = self.blobs / blob_name(digests)
        self.blobs.mkdir(parents=True, exist_ok=True)
        if blob.exists() and not mismatch(digests_of(blob, digests), digests):
            data.unlink()  # others' manifests know that one's time
        else:
            data.replace(blob)
        return ManifestEntry.of(blob, digests, blob.name)

    def refer(self, path: Path, file: File, digests: dict[str, str]) -> ManifestEntry:
        """Use a checked file where it lies, outside of this cache."""
        return ManifestEntry.of(path, {**file.digests, **digests}, str(path))

    def publish(self, pin: Pin, entries: dict[str, ManifestEntry]) -> Manifest | None:
        """Make a pin visible; None if one of its files has gone meanwhile. The caller holds the pin's lock."""
        manifest = Manifest(pin=pin, made=time.time(), entries=entries, boot=boot_id())
        draft = self._models / f".{pin.id}.new"
        shutil.rmtree(draft, ignore_errors=True)
        for name, entry in entries.items():
            link = draft / name
            link.parent.mkdir(parents=True, exist_ok=True)
            up = "/".join([".."] * (2 + name.count("/")))
            link.symlink_to(entry.place if os.path.isabs(entry.place) else f"{up}/blobs/{entry.place}")
        with self._index():
            shutil.rmtree(self.folder(pin.id), ignore_errors=True)
            if not all(self.is_whole(entry) for entry in entries.values()):
                shutil.rmtree(draft, ignore_errors=True)
                return None
            draft.rename(self.folder(pin.id))
            self._write(manifest)
        return manifest

    def made_again(self, manifest: Manifest) -> Manifest:
        """Note that a complete pin was imported once more, now."""
        manifest = manifest.model_copy(update={"made": time.time()})
        self._write(manifest)
        return manifest

    def settle(self, manifest: Manifest) -> None:
        """Wait until its bytes are on the disk; from then on not even a power failure makes it be hashed again."""
        for entry in manifest.entries.values():
            handle = os.open(self.where(entry), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        with self._index():
            path = self._manifests / f"{manifest.pin.id}.json"
            if path.exists():
                stat = path.stat()
                self._write(manifest.model_copy(update={"boot": ""}))
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def verify(self, manifest: Manifest) -> list[str]:
        """Hash its files again; what is wrong, a line each. A damaged one is no longer complete, and fetched again."""
        wrong = []
        for name, entry in manifest.entries.items():
            place = self.where(entry)
            try:
                found = digests_of(place, entry.digests)
            except OSError as error:
                wrong.append(f"{name} cannot be read: {error.strerror}")
                continue
            difference = mismatch(found, entry.digests)
            if difference:
                wrong.append(f"{name} is damaged: its {difference}")
                if not os.path.isabs(entry.place):
                    place.unlink(missing_ok=True)
        if wrong:
            self._forget(manifest.pin.id)
        return wrong

    def remove(self, manifest: Manifest, using: Collection[str] = ()) -> int:
        """Remove a pin and its blobs, but those that another one has or that are in `using`; the bytes freed."""
        with self._index():
            self._forget(manifest.pin.id)
        return self.drop(entry for entry in manifest.entries.values() if entry.place not in using)

    def drop(self, entries: Iterable[ManifestEntry]) -> int:
        """Remove those of the files that no complete pin has; the bytes freed."""
        with self._index():
            mine = {entry.place for entry in entries if not os.path.isabs(entry.place)}
            return self._drop(mine - self._places())

    def _drop_orphans(self, using: Collection[str] = ()) -> int:
        """Remove blobs that no complete pin has: a killed or broken-off sync brought them. The bytes freed.

        One that another sync has just brought is missed when that is published, and fetched again.
        """
        with self._index():
            return self._drop({path.name for path in self.blobs.glob("*")} - self._places() - set(using))

    def prune(self) -> int:
        """Remove blobs and parts of downloads that nothing uses; the bytes freed."""
        freed = self._drop_orphans() + self._drop_partial()
        complete = {path.stem for path in self._manifests.glob("*.json")}
        for folder in self._models.glob("*"):
            pin_id = folder.name.removeprefix(".").removesuffix(".new")
            with locked(self.lock(pin_id), 0) as mine:
                if mine and (pin_id not in complete or folder.name != pin_id):
                    shutil.rmtree(folder, ignore_errors=True)
        return freed

    def sweep(self) -> None:
        """Remove what processes that were killed left of small files, which are not resumed (`KEY-PID-….data`)."""
        for path in self.partial.glob("*-*.data"):
            if not psutil.pid_exists(int(path.stem.split("-")[1])):
                path.unlink(missing_ok=True)

    def _drop_partial(self) -> int:
        """Remove parts of downloads that no process works on; the bytes freed."""
        freed = 0
        self.sweep()
        for path in self.partial.glob("*.data"):
            if "-" in path.stem:  # small, and its process lives
                continue
            with locked(path.with_suffix(".lock"), 0) as mine:
                if mine:
                    freed += path.stat().st_blocks * 512
                    discard(path)
        return freed

    def choose_evictions(self, needed: int, keep: Collection[str], what: str, using: Collection[str] = ()) -> None:
        """See to `needed` bytes of room, removing the pins that were not used for longest and are not in `keep`.

        Blobs in `using` stay. Raises WeightsError, with the numbers, before a pin is removed in vain.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free - SPARE_BYTES
        held = self.held()
        short = max(needed - free, held + needed - self.max_bytes if self.max_bytes else 0)
        if short > 0:
            short -= self._drop_orphans(using)
        if short > 0 and needed > free:
            short -= self._drop_partial()
        if short <= 0:
            return
        old = sorted((used, m.pin.id, m) for m, used in self.manifests() if m.pin.id not in keep)
        removable = self._only_in([m for _, _, m in old], using)
        if removable < short:
            limit = f", and {held:,} of LLMRUN_WEIGHTS_MAX_BYTES={self.max_bytes:,} are used" if self.max_bytes else ""
            raise WeightsError(
                f"{what} needs {needed:,} bytes, but {max(free, 0):,} are free in {self.root}{limit}; "
                f"{removable:,} could be removed, the rest belongs to deployed models or to others: "
                f"make room, or set LLMRUN_WEIGHTS_DIR to a larger disk"
            )
        for _, _, manifest in old:
            if short <= 0:
                return
            short -= self.remove(manifest, using)

    def _only_in(self, manifests: list[Manifest], using: Collection[str]) -> int:
        """Bytes of the blobs that only these have."""
        ids = {m.pin.id for m in manifests}
        kept = {e.place for m, _ in self.manifests() if m.pin.id not in ids for e in m.entries.values()}
        sizes = {e.place: e.size for m in manifests for e in m.entries.values() if not os.path.isabs(e.place)}
        return sum(size for place, size in sizes.items() if place not in kept and place not in using)

    def _entries(self) -> Iterator[ManifestEntry]:
        return (entry for manifest, _ in self.manifests() for entry in manifest.entries.values())

    def _places(self) -> set[str]:
        return {entry.place for entry in self._entries()}

    def _drop(self, blobs: set[str]) -> int:
        freed = 0
        for name in blobs:
            path = self.blobs / name
            if path.exists():
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        return freed

    def _forget(self, pin_id: str) -> None:
        (self._manifests / f"{pin_id}.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder(pin_id), ignore_errors=True)

    def _index(self) -> AbstractContextManager[bool]:
        """Held, briefly, while manifests and blobs must agree."""
        return locked(self.root / "index.lock")

    def _read(self, path: Path) -> Manifest | None:
        try:
            return Manifest.model_validate_json(path.read_text())
        except (OSError, ValidationError):  # not there, or of another llmrun: fetched again
            return None

    def _write(self, manifest: Manifest) -> None:
        self._manifests.mkdir(parents=True, exist_ok=True)
        path = self._manifests / f"{manifest.pin.id}.json"
        draft = path.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}")
        draft.write_text(manifest.model_dump_json())
        draft.replace(path)
