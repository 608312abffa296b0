"""Find bytes of a source that this node already has, under any name."""

from __future__ import annotations

import contextlib
from collections import defaultdict

from llmrun_runtime.weights.cache.boot_id import boot_id
from llmrun_runtime.weights.cache.cache import Cache, ManifestEntry
from llmrun_runtime.weights.cache.digests import IDENTIFYING, blob_names, hash_file, mismatch
from llmrun_runtime.weights.pin import File

# Smaller blobs are not hashed in another algorithm to compare them: a download takes no longer.
MIN_COMPARE_BYTES = 8 * 2**20


class LocalFiles:
    """A snapshot of a cache's files.

    The files of complete pins are trusted. A blob is hashed first if no pin has it (its download was killed), or if
    its bytes may not have reached the disk.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._trusted: dict[tuple[str, str], ManifestEntry] = {}
        self._blobs_by_size: defaultdict[int, list[str]] = defaultdict(list)
        for manifest, _ in cache.manifests():
            if manifest.boot in ("", boot_id()):
                for entry in manifest.entries.values():
                    self._trusted |= {
                        (name, value): entry for name, value in entry.digests.items() if name in IDENTIFYING
                    }
        for blob in cache.blobs.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                self._blobs_by_size[blob.stat().st_size].append(blob.name)

    def find(self, file: File) -> ManifestEntry | None:
        """Return the local copy of a file; None if there is none, or if the store has no checksum to identify it."""
        names = set(blob_names(file.digests))
        for name in IDENTIFYING:
            entry = self._trusted.get((name, file.digests.get(name, "")))
            if entry and entry.size == file.size and self._cache.is_intact(entry):
                return entry.model_copy(update={"digests": {**file.digests, **entry.digests}})
        for blob in self._blobs_by_size[file.size] if names else ():
            algorithm = blob.partition("-")[0]
            candidate = blob in names if algorithm in file.digests else file.size >= MIN_COMPARE_BYTES
            entry = self._hash_and_compare(blob, file) if candidate else None
            if entry:
                return entry
        return None

    def _hash_and_compare(self, blob: str, file: File) -> ManifestEntry | None:
        path = self._cache.blobs / blob
        try:
            entry = ManifestEntry.from_path(path, {}, blob)  # before hashing, so that a concurrent change is detected
            digests = hash_file(path, file.digests)
        except FileNotFoundError:
            return None
        if mismatch(digests, file.digests):
            return None
        algorithm, _, digest = blob.partition("-")
        return entry.model_copy(update={"digests": {algorithm: digest, **file.digests, **digests}})
