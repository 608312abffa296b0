"""Copies to stores: a pin from this node's cache, with a file of its checksums; an adapter from a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmrun.errors import WeightsError
from llmrun.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmrun.weights import Weights
from llmrun_runtime.weights.cache.cache import Cache
from llmrun_runtime.weights.pin import MANIFEST, File, Pin
from llmrun_runtime.weights.stores.objects import ObjectStore

FILES_AT_ONCE = 4


def mirror(cache: Cache, pin: Pin, target: Weights, report: Callable[[int, int], None]) -> dict[str, int]:
    """Upload what `target` does not have; how many files went and how many were there. Raises WeightsError."""
    manifest = cache.find(pin.id)
    if not manifest:
        raise WeightsError(f"{pin.weights}: it is not complete on this node: run it again")
    store = ObjectStore(target, FILES_AT_ONCE)
    before = {file.name: file for file in _there(store)}
    sums = store.mirrored() if MANIFEST in before else {}
    here = 0

    def put(name: str) -> bool:
        nonlocal here
        entry = manifest.entries[name]
        there = before.get(name)
        known = {**there.digests, **sums.get((name, there.version), {})} if there else {}
        same = there is not None and there.size == entry.size and bool(known.items() & entry.digests.items())
        if not same:
            store.put(cache.folder(pin.id) / name, name)
        here += entry.size
        report(here, pin.total)
        return not same

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        sent = sum(pool.map(put, manifest.entries))
    versions = {file.name: file for file in store.files()}
    for name, entry in manifest.entries.items():
        if name not in versions or versions[name].size != entry.size:
            raise WeightsError(f"{target}: {name} did not arrive there whole: run it again")
    listed = [
        {"name": name, "version": versions[name].version, "digests": entry.digests}
        for name, entry in manifest.entries.items()
    ]
    content = {"source": pin.weights.canonical, "revision": pin.revision, "files": listed}
    store.write(MANIFEST, json.dumps(content, indent=1).encode())
    return {"sent": sent, "there": len(manifest.entries) - sent}


def push(folder: Path, target: Weights) -> None:
    """Copy an adapter's two files, its configuration last: a folder counts when it has both. Raises WeightsError."""
    if target.path is None:
        store = ObjectStore(target, 1)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            store.put(folder / name, name)
        return
    place = Path(target.path).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            new = place / f".{name}.{os.getpid()}"
            try:
                shutil.copyfile(folder / name, new)
                new.replace(place / name)
            finally:
                new.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{target}: it cannot be written there ({error})") from None


def _there(store: ObjectStore) -> list[File]:
    try:
        return store.files()
    except WeightsError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # nothing yet
            return []
        raise
