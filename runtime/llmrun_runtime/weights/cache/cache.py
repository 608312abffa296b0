"""The cache of weights on a node: a pin in it is complete and checked, or not visible.

    blobs/ALGORITHM-DIGEST   a complete, checked file, shared by all pins that contain it
    models/PIN/NAME          links to blobs, or into the Hub's cache; engines load this folder
    manifests/PIN.json       written last: a pin without it is incomplete
    partial/KEY              a partial download of a large file and its journal (transfer.py)

A manifest's mtime is the time of its last use. This module knows no stores.
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
from llmrun_runtime.weights.cache.digests import blob_name, hash_file, mismatch
from llmrun_runtime.weights.cache.locks import locked
from llmrun_runtime.weights.pin import File, Pin

# Disk space that is left for logs and databases.
RESERVED_BYTES = 64 * 2**20


class ManifestEntry(BaseModel):
    """One file of a complete pin."""

    size: int
    mtime_ns: int
    digests: dict[str, str]
    place: str
    """A blob's name, or the absolute path of a file in the Hub's cache."""

    @classmethod
    def from_path(cls, path: Path, digests: dict[str, str], place: str) -> ManifestEntry:
        """Describe the file at `path`. Raises OSError."""
        stat = path.stat()
        return cls(size=stat.st_size, mtime_ns=stat.st_mtime_ns, digests=digests, place=place)

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has this size and mtime."""
        try:
            stat = path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


class Manifest(BaseModel):
    """A complete pin."""

    pin: Pin
    made: float
    """When (Unix time) it was fetched, or last imported."""
    entries: dict[str, ManifestEntry]
    boot: str
    """The boot id at the time of writing; empty once the bytes are synced to disk."""


def discard_partial(data: Path) -> None:
    """Remove a partial download and its journal (transfer.py)."""
    data.unlink(missing_ok=True)
    data.with_suffix(".parts").unlink(missing_ok=True)


def open_cache(settings: Settings) -> Cache:
    """Return this node's cache."""
    return Cache(settings.weights_root, settings.weights_max_bytes)


class Cache:
    """The cache in the folder `root`. `max_bytes` limits its blobs; 0: only the disk does."""

    def __init__(self, root: Path, max_bytes: int = 0) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.partial = root / "partial"
        self.blobs = root / "blobs"
        self._models = root / "models"
        self._manifests = root / "manifests"

    def folder(self, pin_id: str) -> Path:
        """The folder that an engine loads a complete pin from."""
        return self._models / pin_id

    def lock_path(self, pin_id: str) -> Path:
        """The lock for work on a pin."""
        return self.root / "locks" / f"{pin_id}.lock"

    def find(self, pin_id: str) -> Manifest | None:
        """Return a pin if it is complete, judged by sizes and mtimes; otherwise None.

        Files that were not synced to disk before a reboot are hashed once more.
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
        """Whether all its files exist, judged by sizes and mtimes."""
        folder = self.folder(manifest.pin.id)
        return all(entry.matches(folder / name) for name, entry in manifest.entries.items())

    def load(self, pin_id: str) -> Manifest | None:
        """Return a pin's manifest without checking its files."""
        return self._read(self._manifests / f"{pin_id}.json")

    def touch(self, pin_id: str) -> None:
        """Record a use of the pin."""
        with contextlib.suppress(FileNotFoundError):  # another process has just evicted it
            os.utime(self._manifests / f"{pin_id}.json")

    def manifests(self) -> Iterator[tuple[Manifest, float]]:
        """Yield all complete pins, each with the time (Unix time) of its last use."""
        for path in sorted(self._manifests.glob("*.json")):
            manifest = self._read(path)
            with contextlib.suppress(FileNotFoundError):
                if manifest:
                    yield manifest, path.stat().st_mtime

    def used_bytes(self) -> int:
        """Return the total size of all blobs."""
        total = 0
        for path in self.blobs.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                total += path.stat().st_size
        return total

    def is_intact(self, entry: ManifestEntry) -> bool:
        """Whether the file still has its size and mtime."""
        return entry.matches(self.path_of(entry))

    def path_of(self, entry: ManifestEntry) -> Path:
        """The path of the file itself."""
        return self.blobs / entry.place  # an absolute place replaces the left side

    def adopt(self, data: Path, file: File, digests: dict[str, str]) -> ManifestEntry:
        """Move a file, already checked against `digests`, into the cache."""
        digests = {**file.digests, **digests}
        blob = self.blobs / blob_name(digests)
        self.blobs.mkdir(parents=True, exist_ok=True)
        if blob.exists() and not mismatch(hash_file(blob, digests), digests):
            data.unlink()  # keep the existing blob: other manifests contain its mtime
        else:
            data.replace(blob)
        return ManifestEntry.from_path(blob, digests, blob.name)

    def reference(self, path: Path, file: File, digests: dict[str, str]) -> ManifestEntry:
        """Use a checked file in place, outside of this cache."""
        return ManifestEntry.from_path(path, {**file.digests, **digests}, str(path))

    def publish(self, pin: Pin, entries: dict[str, ManifestEntry]) -> Manifest | None:
        """Make a pin visible; None if one of its files was removed. The caller holds the pin's lock."""
        manifest = Manifest(pin=pin, made=time.time(), entries=entries, boot=boot_id())
        draft = self._models / f".{pin.id}.new"
        shutil.rmtree(draft, ignore_errors=True)
        for name, entry in entries.items():
            link = draft / name
            link.parent.mkdir(parents=True, exist_ok=True)
            up = "/".join([".."] * (2 + name.count("/")))
            link.symlink_to(entry.place if os.path.isabs(entry.place) else f"{up}/blobs/{entry.place}")
        with self._index_lock():
            shutil.rmtree(self.folder(pin.id), ignore_errors=True)
            if not all(self.is_intact(entry) for entry in entries.values()):
                shutil.rmtree(draft, ignore_errors=True)
                return None
            draft.rename(self.folder(pin.id))
            self._write(manifest)
        return manifest

    def mark_imported(self, manifest: Manifest) -> Manifest:
        """Record that a complete pin was imported again now."""
        manifest = manifest.model_copy(update={"made": time.time()})
        self._write(manifest)
        return manifest

    def sync_to_disk(self, manifest: Manifest) -> None:
        """Wait until the bytes are on disk; after that, a power failure does not cause another hash."""
        for entry in manifest.entries.values():
            fd = os.open(self.path_of(entry), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        with self._index_lock():
            path = self._manifests / f"{manifest.pin.id}.json"
            if path.exists():
                stat = path.stat()
                self._write(manifest.model_copy(update={"boot": ""}))
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def verify(self, manifest: Manifest) -> list[str]:
        """Hash its files again and return one line per problem; the pin is then incomplete and is fetched again."""
        problems = []
        for name, entry in manifest.entries.items():
            path = self.path_of(entry)
            try:
                digests = hash_file(path, entry.digests)
            except OSError as error:
                problems.append(f"cannot read {name}: {error.strerror}")
                continue
            difference = mismatch(digests, entry.digests)
            if difference:
                problems.append(f"{name} is damaged: its {difference}")
                if not os.path.isabs(entry.place):
                    path.unlink(missing_ok=True)
        if problems:
            self._unpublish(manifest.pin.id)
        return problems

    def remove(self, manifest: Manifest, in_use: Collection[str] = ()) -> int:
        """Remove a pin and its blobs, except those shared with another pin or in `in_use`. Return the bytes freed."""
        with self._index_lock():
            self._unpublish(manifest.pin.id)
        return self.remove_unreferenced(entry for entry in manifest.entries.values() if entry.place not in in_use)

    def remove_unreferenced(self, entries: Iterable[ManifestEntry]) -> int:
        """Remove those of the files that no complete pin contains. Return the bytes freed."""
        with self._index_lock():
            blobs = {entry.place for entry in entries if not os.path.isabs(entry.place)}
            return self._remove_blobs(blobs - self._referenced_places())

    def _remove_orphans(self, in_use: Collection[str] = ()) -> int:
        """Remove blobs that no complete pin contains, left by a killed or failed fetch. Return the bytes freed.

        If another fetch has just written one of them, its `publish` fails and it is fetched again.
        """
        with self._index_lock():
            blobs = {path.name for path in self.blobs.glob("*")}
            return self._remove_blobs(blobs - self._referenced_places() - set(in_use))

    def prune(self) -> int:
        """Remove unused blobs and partial downloads. Return the bytes freed."""
        freed = self._remove_orphans() + self._remove_partial_downloads()
        complete = {path.stem for path in self._manifests.glob("*.json")}
        for folder in self._models.glob("*"):
            pin_id = folder.name.removeprefix(".").removesuffix(".new")
            with locked(self.lock_path(pin_id), 0) as acquired:
                if acquired and (pin_id not in complete or folder.name != pin_id):
                    shutil.rmtree(folder, ignore_errors=True)
        return freed

    def remove_stale_small_files(self) -> None:
        """Remove partial small files of killed processes (`KEY-PID-….data`): they are never resumed."""
        for path in self.partial.glob("*-*.data"):
            if not psutil.pid_exists(int(path.stem.split("-")[1])):
                path.unlink(missing_ok=True)

    def _remove_partial_downloads(self) -> int:
        """Remove partial downloads that no process is working on. Return the bytes freed."""
        freed = 0
        self.remove_stale_small_files()
        for path in self.partial.glob("*.data"):
            if "-" in path.stem:  # a small file of a running process
                continue
            with locked(path.with_suffix(".lock"), 0) as acquired:
                if acquired:
                    freed += path.stat().st_blocks * 512
                    discard_partial(path)
        return freed

    def evict_for(self, needed: int, keep: Collection[str], content: str, in_use: Collection[str] = ()) -> None:
        """Free `needed` bytes for `content`: evict the least recently used pins that are not in `keep`.

        Blobs in `in_use` stay. Raises WeightsError, with the numbers, before it removes a pin in vain.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free - RESERVED_BYTES
        used = self.used_bytes()
        short = max(needed - free, used + needed - self.max_bytes if self.max_bytes else 0)
        if short > 0:
            short -= self._remove_orphans(in_use)
        if short > 0 and needed > free:
            short -= self._remove_partial_downloads()
        if short <= 0:
            return
        oldest_first = sorted((at, m.pin.id, m) for m, at in self.manifests() if m.pin.id not in keep)
        evictable = self._exclusive_bytes([m for _, _, m in oldest_first], in_use)
        if evictable < short:
            limit = f", and LLMRUN_WEIGHTS_MAX_BYTES={self.max_bytes:,} with {used:,} in use" if self.max_bytes else ""
            raise WeightsError(
                f"not enough disk space: {content} needs {needed:,} bytes, {max(free, 0):,} are free in {self.root}"
                f"{limit}; {evictable:,} can be evicted, deployed models and other files use the rest. "
                f"Free disk space, or set LLMRUN_WEIGHTS_DIR to a larger disk"
            )
        for _, _, manifest in oldest_first:
            if short <= 0:
                return
            short -= self.remove(manifest, in_use)

    def _exclusive_bytes(self, manifests: list[Manifest], in_use: Collection[str]) -> int:
        """Return the size of the blobs that only these pins contain."""
        ids = {m.pin.id for m in manifests}
        shared = {e.place for m, _ in self.manifests() if m.pin.id not in ids for e in m.entries.values()}
        sizes = {e.place: e.size for m in manifests for e in m.entries.values() if not os.path.isabs(e.place)}
        return sum(size for place, size in sizes.items() if place not in shared and place not in in_use)

    def _referenced_places(self) -> set[str]:
        return {entry.place for manifest, _ in self.manifests() for entry in manifest.entries.values()}

    def _remove_blobs(self, names: set[str]) -> int:
        freed = 0
        for name in names:
            path = self.blobs / name
            if path.exists():
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        return freed

    def _unpublish(self, pin_id: str) -> None:
        (self._manifests / f"{pin_id}.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder(pin_id), ignore_errors=True)

    def _index_lock(self) -> AbstractContextManager[bool]:
        """Hold briefly for changes that must keep manifests and blobs consistent."""
        return locked(self.root / "index.lock")

    def _read(self, path: Path) -> Manifest | None:
        try:
            return Manifest.model_validate_json(path.read_text())
        except (OSError, ValidationError):  # missing, or written by another version of llmrun: fetched again
            return None

    def _write(self, manifest: Manifest) -> None:
        self._manifests.mkdir(parents=True, exist_ok=True)
        path = self._manifests / f"{manifest.pin.id}.json"
        draft = path.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}")
        draft.write_text(manifest.model_dump_json())
        draft.replace(path)
