"""Find the adapters at a source and the files that each one needs. Pure: does no I/O."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from llmrun.lora import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_WEIGHTS
from llmrun.weights import Weights
from llmrun_runtime.weights.pin import File, Pin, check_file_name

MAX_SKIPPED = 20
# In order of preference.
WEIGHT_FILES = (ADAPTER_WEIGHTS, "adapter_model.bin")


class Adapter(BaseModel):
    """One adapter: a pin of its files and their folder within it."""

    model_config = ConfigDict(frozen=True)
    name: str
    pin: Pin
    folder: str = ""
    """Relative to the pin's folder."""
    rank: int = 0
    """The LoRA rank in its configuration; 0 if it could not be read."""

    @cached_property
    def config_id(self) -> str:
        """An id of the configuration's bytes; unchanged by a commit that does not change that file."""
        weights = self.pin.weights
        source = weights.repo if weights.kind == "hub" else weights.canonical
        file = next(file for file in self.pin.files if file.name.rpartition("/")[2] == ADAPTER_CONFIG)
        version = sorted(file.digests.items()) or file.version or self.pin.revision
        content = json.dumps([weights.endpoint_url, source, file.name, file.size, version])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class AdapterListing(BaseModel):
    """The adapters at a source at one moment."""

    digest: str
    """Equal for equal listings."""
    adapters: tuple[Adapter, ...] | None = None
    """None: they are those of the listing that the caller knows. 10,000 adapters are 10 MB, and rarely change."""
    skipped: dict[str, str] = {}
    """See `find_skipped`."""


def find_adapters(listing: Pin) -> dict[str, Adapter]:
    """Return the adapters among all files of a source, by name: one per folder, or the source itself.

    A folder counts once it contains both a configuration and weights. Raises WeightsError for a file name outside
    the folder.
    """
    weights, folders = listing.weights, defaultdict[str, dict[str, File]](dict)
    for file in listing.files:
        check_file_name(file.name, weights)
        folder, _, name = file.name.rpartition("/")
        folders[folder][name] = file
    adapters = {}
    for folder, files in folders.items():
        needed = _adapter_files(files)
        name = folder or _source_name(weights)
        if needed and ADAPTER_NAME.fullmatch(name):
            adapters[name] = Adapter(name=name, **_pin_files(listing, folder, needed))
    return adapters


def find_skipped(listing: Pin) -> dict[str, str]:
    """Return the first MAX_SKIPPED folders that look like adapters and are none, with the reasons. Pure."""
    folders = defaultdict[str, set[str]](set)
    for file in listing.files:
        folder, _, name = file.name.rpartition("/")
        folders[folder].add(name)
    adapters = {folder for folder, files in folders.items() if ADAPTER_CONFIG in files}
    skipped: dict[str, str] = {}
    for folder, files in sorted(folders.items()):
        has_weights = any(name in files for name in WEIGHT_FILES)
        above = folder.rpartition("/")[0]
        if not folder or above in adapters or len(skipped) == MAX_SKIPPED:
            continue  # a checkpoint inside an adapter is a part of its training
        if ADAPTER_CONFIG in files and not has_weights:
            skipped[folder] = f"it has no {ADAPTER_WEIGHTS}"
        elif ADAPTER_CONFIG in files and above:
            skipped[folder] = "it is nested: adapters are the folders directly below the source"
        elif ADAPTER_CONFIG in files and not ADAPTER_NAME.fullmatch(folder):
            skipped[folder] = "its name must be letters, digits, '.', '_' and '-', and begin with a letter or digit"
        elif has_weights and ADAPTER_CONFIG not in files:
            skipped[folder] = f"it has no {ADAPTER_CONFIG}"
    return skipped


def _adapter_files(files: dict[str, File]) -> list[File]:
    """Return the files that an engine needs; empty unless the folder contains a complete adapter."""
    best = next((files[name] for name in WEIGHT_FILES if name in files), None)
    return [files[ADAPTER_CONFIG], best] if ADAPTER_CONFIG in files and best else []


def _pin_files(listing: Pin, folder: str, files: Iterable[File]) -> dict[str, object]:
    """Pin an adapter's files: a commit covers a whole repository; in a store each folder is its own source."""
    weights = listing.weights
    if not folder or weights.kind == "hub":
        return {"pin": listing.model_copy(update={"files": tuple(files)}), "folder": folder}
    subfolder = Weights(
        f"{weights.source.rstrip('/')}/{folder}", endpoint_url=weights.endpoint_url, anonymous=weights.anonymous
    )
    relative = tuple(file.model_copy(update={"name": file.name.rpartition("/")[2]}) for file in files)
    return {"pin": Pin(weights=subfolder, revision=listing.revision, files=relative)}


def _source_name(weights: Weights) -> str:
    """The name of an adapter that is a source by itself: the last part of its address."""
    return (weights.repo if weights.kind == "hub" else weights.canonical.rstrip("/")).rpartition("/")[2]
