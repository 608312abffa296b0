"""Import a folder of this node into its cache, under the name of a source."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from pathlib import Path

from llmrun.errors import WeightsError
from llmrun.weights import Weights
from llmrun_runtime.safetensors_files import find_damaged
from llmrun_runtime.weights.cache.cache import Cache, Manifest, ManifestEntry
from llmrun_runtime.weights.cache.digests import hash_file
from llmrun_runtime.weights.cache.local_files import LocalFiles
from llmrun_runtime.weights.cache.locks import locked
from llmrun_runtime.weights.fetch import Progress
from llmrun_runtime.weights.pin import File, Pin, select_files


def import_folder(cache: Cache, folder: Path, weights: Weights, keep: Collection[str], progress: Progress) -> Manifest:
    """Copy a folder's files into the cache as `weights`.

    An earlier import of that name is removed, unless it is in `keep`. Raises WeightsError.
    """
    try:
        found = [
            File(name=path.relative_to(folder).as_posix(), size=path.stat().st_size)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
    except OSError as error:
        raise WeightsError(f"cannot read {folder}: {error.strerror}") from None
    files = select_files(found, weights)
    if damage := find_damaged(folder / file.name for file in files):
        raise WeightsError(f"{damage}. Download it again")
    total = sum(file.size for file in files)
    cache.evict_for(total, keep, f"{folder} ({total:,} bytes)")
    entries: dict[str, ManifestEntry] = {}
    try:
        local_files, complete_bytes = LocalFiles(cache), 0
        for file in files:
            entries[file.name] = _copy_file(cache, local_files, folder, file)
            complete_bytes += entries[file.name].size
            progress(complete_bytes, total)
        hashed = [
            file.model_copy(update={"digests": {"sha256": entries[file.name].digests["sha256"]}}) for file in files
        ]
        pin = Pin(weights=weights, files=tuple(hashed), imported=True)
        with locked(cache.lock_path(pin.id)):
            existing = cache.find(pin.id)
            manifest = cache.mark_imported(existing) if existing else cache.publish(pin, entries)
    except OSError as error:
        cache.remove_unreferenced(entries.values())
        reason = "not enough disk space" if error.errno == errno.ENOSPC else error.strerror
        raise WeightsError(f"cannot copy {folder} to {cache.root}: {reason}. The partial copy was removed") from None
    if manifest is None:
        raise WeightsError(f"{folder}: another process removed its files from {cache.root}: import it again")
    for old, _ in list(cache.manifests()):
        same_name = old.pin.imported and old.pin.weights.canonical == weights.canonical
        if same_name and old.pin.id not in {pin.id, *keep}:
            cache.remove(old)
    return manifest


def _copy_file(cache: Cache, local_files: LocalFiles, folder: Path, file: File) -> ManifestEntry:
    """Copy one file; if the cache has its bytes, only hash it. Raises OSError."""
    source = folder / file.name
    hashed = file.model_copy(update={"digests": hash_file(source, {})})
    entry = local_files.find(hashed)
    if entry:
        return entry
    data = cache.partial / f"import-{os.getpid()}.data"
    data.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as read, data.open("wb") as write:
            while os.sendfile(write.fileno(), read.fileno(), None, 2**30):
                pass
        size = data.stat().st_size
        copied = hashed.model_copy(update={"size": size, "digests": hash_file(data, {})})
        return cache.adopt(data, copied, {})
    finally:
        data.unlink(missing_ok=True)
