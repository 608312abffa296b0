"""Upload to stores: a pin from this node's cache with its checksums, or an adapter from a folder."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmrun.errors import WeightsError
from llmrun.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmrun.weights import Weights
from llmrun_runtime.weights.cache.cache import Cache
from llmrun_runtime.weights.fetch import Progress
from llmrun_runtime.weights.pin import MIRROR_MANIFEST, File, Pin
from llmrun_runtime.weights.stores.objects import ObjectStore

CONCURRENT_FILES = 4


def mirror(cache: Cache, pin: Pin, target: Weights, progress: Progress) -> dict[str, int]:
    """Upload the files that `target` lacks. Return the numbers of files `uploaded` and `unchanged`.

    Raises WeightsError.
    """
    manifest = cache.find(pin.id)
    if not manifest:
        raise WeightsError(f"{pin.weights}: incomplete on this node: try again")
    store = ObjectStore(target, CONCURRENT_FILES)
    existing = {file.name: file for file in _existing_files(store)}
    mirror_digests = store.mirror_digests() if MIRROR_MANIFEST in existing else {}
    complete_bytes = 0

    def put(name: str) -> bool:
        nonlocal complete_bytes
        entry = manifest.entries[name]
        old = existing.get(name)
        digests = {**old.digests, **mirror_digests.get((name, old.version), {})} if old else {}
        same = old is not None and old.size == entry.size and bool(digests.items() & entry.digests.items())
        if not same:
            store.put(cache.folder(pin.id) / name, name)
        complete_bytes += entry.size
        progress(complete_bytes, pin.total)
        return not same

    with ThreadPoolExecutor(CONCURRENT_FILES) as pool:
        uploaded_count = sum(pool.map(put, manifest.entries))
    uploaded = {file.name: file for file in store.files()}
    for name, entry in manifest.entries.items():
        if name not in uploaded or uploaded[name].size != entry.size:
            raise WeightsError(f"{target}: {name} was not uploaded completely: try again")
    files = [
        {"name": name, "version": uploaded[name].version, "digests": entry.digests}
        for name, entry in manifest.entries.items()
    ]
    content = {"source": pin.weights.canonical, "revision": pin.revision, "files": files}
    store.write(MIRROR_MANIFEST, json.dumps(content, indent=1).encode())
    return {"uploaded": uploaded_count, "unchanged": len(manifest.entries) - uploaded_count}


def push_adapter(folder: Path, target: Weights) -> None:
    """Copy an adapter's two files, the configuration last: only then is the folder an adapter. Raises WeightsError."""
    if target.path is None:
        store = ObjectStore(target, 1)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            store.put(folder / name, name)
        return
    target_folder = Path(target.path).expanduser()
    try:
        target_folder.mkdir(parents=True, exist_ok=True)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            draft = target_folder / f".{name}.{os.getpid()}"
            try:
                shutil.copyfile(folder / name, draft)
                draft.replace(target_folder / name)
            finally:
                draft.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"cannot write to {target}: {error}") from None


def _existing_files(store: ObjectStore) -> list[File]:
    try:
        return store.files()
    except WeightsError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # the target does not exist yet
            return []
        raise
