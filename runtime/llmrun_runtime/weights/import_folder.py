"""Takes a folder of this node into its cache, under the name of a source."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from pathlib import Path

from llmrun.errors import WeightsError
from llmrun.weights import Weights
from llmrun_runtime.weights.cache.cache import Cache, Manifest, ManifestEntry
from llmrun_runtime.weights.cache.digests import digests_of
from llmrun_runtime.weights.cache.local_files import LocalFiles
from llmrun_runtime.weights.cache.locks import locked
from llmrun_runtime.weights.pin import File, Pin, choose


def take_folder(
    cache: Cache, folder: Path, weights: Weights, keep: Collection[str], report: Callable[[int, int], None]
) -> Manifest:
    """Copy a folder's files into the cache under the name of `weights`; what had that name before goes, if it can.

    `report` is told bytes here, and bytes in all. Raises WeightsError.
    """
    try:
        found = [
            File(name=path.relative_to(folder).as_posix(), size=path.stat().st_size)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
    except OSError as error:
        raise WeightsError(f"{folder}: it cannot be read: {error.strerror}") from None
    files = choose(found, weights)
    total = sum(file.size for file in files)
    cache.choose_evictions(total, keep, f"{folder} ({total:,} bytes)")
    entries: dict[str, ManifestEntry] = {}
    try:
        known, here = LocalFiles(cache), 0
        for file in files:
            entries[file.name] = _take(cache, known, folder, file)
            here += entries[file.name].size
            report(here, total)
        hashed = [
            file.model_copy(update={"digests": {"sha256": entries[file.name].digests["sha256"]}}) for file in files
        ]
        pin = Pin(weights=weights, files=tuple(hashed), imported=True)
        with locked(cache.lock(pin.id)):
            before = cache.find(pin.id)
            manifest = cache.made_again(before) if before else cache.publish(pin, entries)
    except OSError as error:
        cache.drop(entries.values())
        what = "there is no room" if error.errno == errno.ENOSPC else error.strerror
        raise WeightsError(f"{folder} cannot be copied to {cache.root}: {what}; what was copied is removed") from None
    if manifest is None:
        raise WeightsError(f"{folder}: its files vanish from {cache.root}: import it again")
    for old, _ in list(cache.manifests()):
        same = old.pin.imported and old.pin.weights.canonical == weights.canonical
        if same and old.pin.id not in {pin.id, *keep}:
            cache.remove(old)
    return manifest


def _take(cache: Cache, known: LocalFiles, folder: Path, file: File) -> ManifestEntry:
    """Copy one file; only its checksum, if its bytes are here already. Raises OSError."""
    source = folder / file.name
    named = file.model_copy(update={"digests": digests_of(source, {})})
    entry = known.find(named)
    if entry:
        return entry
    data = cache.partial / f"import-{os.getpid()}.data"
    data.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as read, data.open("wb") as write:
            while os.sendfile(write.fileno(), read.fileno(), None, 2**30):
                pass
        size = data.stat().st_size
        copied = named.model_copy(update={"size": size, "digests": digests_of(data, {})})
        return cache.adopt(data, copied, {})
    finally:
        data.unlink(missing_ok=True)
