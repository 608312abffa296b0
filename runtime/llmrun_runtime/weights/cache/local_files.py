"""Which of the bytes that a source has lie on this node already, under whatever name."""

from __future__ import annotations

import contextlib
from collections import defaultdict

from llmrun_runtime.weights.cache.boot_id import boot_id
from llmrun_runtime.weights.cache.cache import Cache, ManifestEntry
from llmrun_runtime.weights.cache.digests import NAMING, blob_names, digests_of, mismatch
from llmrun_runtime.weights.pin import File

# Blobs named by another algorithm are hashed to compare from this size on: below it, fetching is as quick.
COMPARE_BYTES = 8 * 2**20


class LocalFiles:
    """What a cache has, looked at once.

    What a complete pin has is believed. A blob that none has (a sync was killed), or only one whose bytes may not have
    reached the disk, is hashed first.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._sure: dict[tuple[str, str], ManifestEntry] = {}
        self._by_size: defaultdict[int, list[str]] = defaultdict(list)
        for manifest, _ in cache.manifests():
            if manifest.boot in ("", boot_id()):
                for entry in manifest.entries.values():
                    self._sure |= {(name, value): entry for name, value in entry.digests.items() if name in NAMING}
        for blob in cache.blobs.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                self._by_size[blob.stat().st_size].append(blob.name)

    def find(self, file: File) -> ManifestEntry | None:
        """The file as it lies here; None if it does not, or if the store gives no checksum to know it by."""
        names = set(blob_names(file.digests))
        for name in NAMING:
            entry = self._sure.get((name, file.digests.get(name, "")))
            if entry and entry.size == file.size and self._cache.is_whole(entry):
                return entry.model_copy(update={"digests": {**file.digests, **entry.digests}})
        for blob in self._by_size[file.size] if names else ():
            algorithm = blob.partition("-")[0]
            worth = blob in names if algorithm in file.digests else file.size >= COMPARE_BYTES
            entry = self._compared(blob, file) if worth else None
            if entry:
                return entry
        return None

    def _compared(self, blob: str, file: File) -> ManifestEntry | None:
        path = self._cache.blobs / blob
        try:
            entry = ManifestEntry.of(path, {}, blob)  # before it is hashed: a change meanwhile is then seen
            digests = digests_of(path, file.digests)
        except FileNotFoundError:
            return None
        if mismatch(digests, file.digests):
            return None
        algorithm, _, digest = blob.partition("-")
        return entry.model_copy(update={"digests": {algorithm: digest, **file.digests, **digests}})
