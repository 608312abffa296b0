"""Adapters at a source: which there are, and which files each of them needs. Pure; knows no store and no disk."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from llmrun.lora import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_WEIGHTS
from llmrun.weights import Weights
from llmrun_runtime.weights.pin import File, Pin, check_name

# The first that is there is taken.
WEIGHTS = (ADAPTER_WEIGHTS, "adapter_model.bin")


class Adapter(BaseModel):
    """One adapter: its files, pinned, and where among them it lies."""

    model_config = ConfigDict(frozen=True)
    name: str
    pin: Pin
    folder: str = ""
    """Below the pin's own folder."""
    rank: int = 0
    """As its configuration says; 0 if that could not be read."""

    @cached_property
    def config_id(self) -> str:
        """A name for its configuration's bytes, which a new commit that leaves that file alone does not change."""
        weights = self.pin.weights
        source = weights.repo if weights.kind == "hub" else weights.canonical
        file = next(file for file in self.pin.files if file.name.rpartition("/")[2] == ADAPTER_CONFIG)
        which = sorted(file.digests.items()) or file.version or self.pin.revision
        said = json.dumps([weights.endpoint_url, source, file.name, file.size, which])
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def find_adapters(listed: Pin) -> dict[str, Adapter]:
    """The adapters among all files of a source, by name: one in each folder, or the source itself is one.

    A folder counts once its configuration and its weights are both there. Raises WeightsError for a name that would
    leave its folder.
    """
    weights, folders = listed.weights, defaultdict[str, dict[str, File]](dict)
    for file in listed.files:
        check_name(file.name, weights)
        folder, _, name = file.name.rpartition("/")
        folders[folder][name] = file
    found = {}
    for folder, files in folders.items():
        taken = _taken(files)
        name = folder or _last_word(weights)
        if taken and ADAPTER_NAME.fullmatch(name):
            found[name] = Adapter(name=name, **_pinned(listed, folder, taken))
    return found


def _taken(files: dict[str, File]) -> list[File]:
    """What an engine needs of a folder; nothing if it is no whole adapter."""
    best = next((files[name] for name in WEIGHTS if name in files), None)
    return [files[ADAPTER_CONFIG], best] if ADAPTER_CONFIG in files and best else []


def _pinned(listed: Pin, folder: str, files: Iterable[File]) -> dict[str, object]:
    """A commit names all files of a repository; in a store each folder is a source of its own."""
    weights = listed.weights
    if not folder or weights.kind == "hub":
        return {"pin": listed.model_copy(update={"files": tuple(files)}), "folder": folder}
    below = Weights(
        f"{weights.source.rstrip('/')}/{folder}", endpoint_url=weights.endpoint_url, anonymous=weights.anonymous
    )
    short = tuple(file.model_copy(update={"name": file.name.rpartition("/")[2]}) for file in files)
    return {"pin": Pin(weights=below, revision=listed.revision, files=short)}


def _last_word(weights: Weights) -> str:
    """What an adapter is called that is a source by itself."""
    return (weights.repo if weights.kind == "hub" else weights.canonical.rstrip("/")).rpartition("/")[2]
