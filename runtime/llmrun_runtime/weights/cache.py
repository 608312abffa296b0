"""The weights that lie on a node: complete and checked, or not visible.

    blobs/ALGORITHM-DIGEST   a file, complete and checked; shared by all pins that have it
    models/PIN/NAME          links to blobs, or into the Hub's cache: what engines load
    manifests/PIN.json       written last: a folder without it is not complete
    partial/KEY              what has come of a large file, and which parts (transfer.py)

Knows no store. A manifest's time of change is when it was last used.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from llmrun.errors import WeightsError
from llmrun_runtime.weights.digests import NAMING, blob_name, blob_names, digests_of, mismatch
from llmrun_runtime.weights.locks import locked
from llmrun_runtime.weights.pin import File, Pin

# Local bytes of a size are hashed, to learn whether they are those wanted, from here on: below, fetching is as quick.
COMPARE_BYTES = 8 * 2**20
# What is left free of a disk, for logs and databases.
SPARE_BYTES = 64 * 2**20


class Entry(BaseModel):
    """A file as it lies here."""

    size: int
    mtime_ns: int
    digests: dict[str, str]
    place: str
    """A blob's name, or the absolute path of a file of the Hub's cache."""


class Manifest(BaseModel):
    """A pin that is complete here."""

    pin: Pin
    entries: dict[str, Entry]
    boot: str
    """The boot in which it was written; empty once its bytes are known to be on the disk."""


def boot_id() -> str:
    """What changes when the machine starts anew: files that were not synced may then be damaged."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


class Cache:
    """The folder `root`; `max_bytes` bounds its blobs (0: the disk does)."""

    def __init__(self, root: Path, max_bytes: int = 0) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.partial = root / "partial"
        self._blobs = root / "blobs"
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
        if manifest is None:
            return None
        for name, entry in manifest.entries.items():
            try:
                stat = (self.folder(pin_id) / name).stat()
            except OSError:
                return None
            if (stat.st_size, stat.st_mtime_ns) != (entry.size, entry.mtime_ns):
                return None
        if manifest.boot and manifest.boot != boot_id():
            if self.verify(manifest):
                return None
            self._write(manifest.model_copy(update={"boot": ""}))
        return manifest

    def load(self, pin_id: str) -> Manifest | None:
        """A pin's manifest, whatever has become of its files."""
        return self._read(self._manifests / f"{pin_id}.json")

    def used(self, pin_id: str) -> None:
        """Note that it is used now."""
        os.utime(self._manifests / f"{pin_id}.json")

    def manifests(self) -> Iterator[tuple[Manifest, float]]:
        """All complete pins, and when (Unix time) they were last used."""
        for path in sorted(self._manifests.glob("*.json")):
            manifest = self._read(path)
            if manifest:
                yield manifest, path.stat().st_mtime

    def known(self, file: File) -> Entry | None:
        """The file, if its bytes lie here already, under whatever name; large ones of its size are compared."""
        for name in blob_names(file.digests):
            entry = self._entry(name, file, {})
            if entry:
                return entry
        if not any(name in file.digests for name in NAMING):
            return None
        for manifest, _ in self.manifests():
            for entry in manifest.entries.values():
                both = entry.digests.keys() & file.digests.keys() & set(NAMING)
                if both and not mismatch(entry.digests, file.digests) and self._is_whole(entry):
                    return entry
        if file.size < COMPARE_BYTES or not self._blobs.is_dir():
            return None
        for blob in self._blobs.iterdir():
            if blob.stat().st_size == file.size:
                digests = digests_of(blob, file.digests)
                if not mismatch(digests, file.digests):
                    return self._entry(blob.name, file, digests)
        return None

    def _entry(self, blob: str, file: File, digests: dict[str, str]) -> Entry | None:
        try:
            stat = (self._blobs / blob).stat()
        except OSError:
            return None
        algorithm, _, digest = blob.partition("-")
        digests = {algorithm: digest, **file.digests, **digests}
        entry = Entry(size=stat.st_size, mtime_ns=stat.st_mtime_ns, digests=digests, place=blob)
        return entry if stat.st_size == file.size else None

    def _is_whole(self, entry: Entry) -> bool:
        try:
            stat = self.where(entry).stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (entry.size, entry.mtime_ns)

    def where(self, entry: Entry) -> Path:
        """The file itself."""
        return self._blobs / entry.place  # an absolute place stays as it is

    def adopt(self, data: Path, file: File, digests: dict[str, str]) -> Entry:
        """Take in a file that has been checked against `digests`, by moving it."""
        digests = {**file.digests, **digests}
        blob = self._blobs / blob_name(digests)
        self._blobs.mkdir(parents=True, exist_ok=True)
        if blob.exists() and blob.stat().st_size == file.size:  # others' manifests know its time
            data.unlink()
        else:
            data.replace(blob)
        stat = blob.stat()
        return Entry(size=stat.st_size, mtime_ns=stat.st_mtime_ns, digests=digests, place=blob.name)

    def refer(self, path: Path, file: File, digests: dict[str, str]) -> Entry:
        """Use a checked file where it lies, outside of this cache."""
        stat = path.stat()
        digests = {**file.digests, **digests}
        return Entry(size=stat.st_size, mtime_ns=stat.st_mtime_ns, digests=digests, place=str(path))

    def publish(self, pin: Pin, entries: dict[str, Entry]) -> Manifest | None:
        """Make a pin visible; None if one of its files has gone meanwhile. The caller holds the pin's lock."""
        manifest = Manifest(pin=pin, entries=entries, boot=boot_id())
        draft = self._models / f".{pin.id}.new"
        shutil.rmtree(draft, ignore_errors=True)
        for name, entry in entries.items():
            link = draft / name
            link.parent.mkdir(parents=True, exist_ok=True)
            up = "/".join([".."] * (2 + name.count("/")))
            link.symlink_to(entry.place if os.path.isabs(entry.place) else f"{up}/blobs/{entry.place}")
        with self._index():
            shutil.rmtree(self.folder(pin.id), ignore_errors=True)
            if not all(self._is_whole(entry) for entry in entries.values()):
                shutil.rmtree(draft, ignore_errors=True)
                return None
            draft.rename(self.folder(pin.id))
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

    def remove(self, manifest: Manifest) -> int:
        """Remove a pin and the blobs that no other one has; the bytes freed."""
        with self._index():
            self._forget(manifest.pin.id)
        return self.drop(manifest.entries.values())

    def drop(self, entries: Iterable[Entry]) -> int:
        """Remove those of the files that no complete pin has; the bytes freed."""
        with self._index():
            mine = {entry.place for entry in entries if not os.path.isabs(entry.place)}
            return self._drop(mine - self._places())

    def prune(self) -> int:
        """Remove blobs and parts of downloads that nothing uses; the bytes freed."""
        with self._index():
            blobs = {path.name for path in self._blobs.glob("*")}
            freed = self._drop(blobs - self._places())
        freed += self._drop_partial()
        complete = {path.stem for path in self._manifests.glob("*.json")}
        for folder in self._models.glob("*"):
            pin_id = folder.name.removeprefix(".").removesuffix(".new")
            with locked(self.lock(pin_id), 0) as mine:
                if mine and (pin_id not in complete or folder.name != pin_id):
                    shutil.rmtree(folder, ignore_errors=True)
        return freed

    def _drop_partial(self) -> int:
        """Remove parts of downloads that no process works on; the bytes freed."""
        freed = 0
        for path in self.partial.glob("*.data"):
            with locked(path.with_suffix(".lock"), 0) as mine:
                if mine:
                    freed += path.stat().st_blocks * 512
                    path.unlink(missing_ok=True)
                    path.with_suffix(".parts").unlink(missing_ok=True)
        return freed

    def make_room(self, needed: int, keep: Collection[str], what: str) -> None:
        """See to `needed` bytes of room, removing what was not used for longest and is not in `keep`.

        Raises WeightsError, with the numbers, before anything is removed in vain.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free - SPARE_BYTES
        held = sum(path.stat().st_size for path in self._blobs.glob("*"))
        short = max(needed - free, held + needed - self.max_bytes if self.max_bytes else 0)
        if needed > free:
            short -= self._drop_partial()
        if short <= 0:
            return
        old = sorted((used, m.pin.id, m) for m, used in self.manifests() if m.pin.id not in keep)
        removable = self._only_in([m for _, _, m in old])
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
            short -= self.remove(manifest)

    def _only_in(self, manifests: list[Manifest]) -> int:
        """Bytes of the blobs that only these have."""
        ids = {m.pin.id for m in manifests}
        kept = {e.place for m, _ in self.manifests() if m.pin.id not in ids for e in m.entries.values()}
        sizes = {e.place: e.size for m in manifests for e in m.entries.values() if not os.path.isabs(e.place)}
        return sum(size for place, size in sizes.items() if place not in kept)

    def _places(self) -> set[str]:
        return {entry.place for manifest, _ in self.manifests() for entry in manifest.entries.values()}

    def _drop(self, blobs: set[str]) -> int:
        freed = 0
        for name in blobs:
            path = self._blobs / name
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
