"""A pin: what a source's name means at one moment, file by file. And which files of a source an engine needs.

Pure; knows no store and no disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from llmrun.errors import WeightsError
from llmrun.weights import AnyWeights, Weights

# What engines read: https://huggingface.co/docs/hub/models-libraries and vLLM's loaders.
NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.spm", "*.vocab")
# Weights of other formats, each only where no format before it is there.
FALLBACKS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
# Copies of the same weights for other programs, and what is left over from training.
NEVER = (
    *("original/*", "metal/*", "onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*", "runs/*", ".git*", "*/.git*"),
    *("*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*training_args.bin", "*optimizer.pt"),
    *("*scheduler.pt", "*scaler.pt", "*rng_state*.pth", "README*", "LICENSE*", "requirements*.txt"),
)
# One file that holds all, which Mistral's repositories have beside the same weights in shards.
CONSOLIDATED = "consolidated*.safetensors"
MANIFEST = ".llmrun-weights.json"
"""The file that `llmrun weights mirror` leaves at its destination: checksums."""


class File(BaseModel):
    """One file of a source."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    """Its path below the source, with `/`."""
    size: int
    """Bytes."""
    digests: dict[str, str] = {}
    """Hexadecimal, by algorithm: `sha256`, `md5`, `git` (SHA-1 of git's blob), `crc32c`. As the store gives them."""
    version: str = ""
    """The store's own name for these bytes: an ETag, a generation. Empty where the revision says it all."""


class Pin(BaseModel):
    """What a source's name means: a revision and its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: AnyWeights
    revision: str = ""
    """The Hub's commit; empty for stores, where the files say it."""
    files: tuple[File, ...]
    imported: bool = False
    """Put under this name by `llmrun weights import`, not fetched from it."""

    @cached_property
    def id(self) -> str:
        """A name for a folder: two pins of the same bytes from the same place have the same one."""
        source = self.weights.repo if self.weights.kind == "hub" else self.weights.canonical
        files = [(f.name, f.size, sorted(f.digests.items()), f.version) for f in self.files]
        said = json.dumps([self.weights.endpoint_url, source, self.revision, files, self.imported])
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", source.rpartition("/")[2]).strip("-.")[:64] or "weights"
        return f"{slug}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def short(self) -> str:
        """What the name was pinned to, for a person: a commit, or the hash of the manifest."""
        hashed = self.id.rpartition("-")[2][:12]
        return f"imported {hashed}" if self.imported else self.revision[:12] or hashed


def choose(files: Iterable[File], weights: Weights) -> tuple[File, ...]:
    """The files to take, by name; `include` and `exclude` are the source's.

    Raises WeightsError for a name that would leave the folder, and if nothing that an engine could load is left.
    """
    found = {file.name: file for file in files}
    for name in found:
        check_name(name, weights)
    if not found:
        raise WeightsError(f"{weights}: there are no files at that address")
    patterns = weights.include or _default(found)
    refused = () if weights.include else NEVER
    chosen = sorted(
        name
        for name in found
        if name != MANIFEST and _matches(name, patterns) and not _matches(name, (*refused, *weights.exclude))
    )
    sharded = any(name.endswith(".safetensors") and not fnmatchcase(name, CONSOLIDATED) for name in chosen)
    if not weights.include and sharded:
        chosen = [name for name in chosen if not fnmatchcase(name, CONSOLIDATED)]
    if not chosen:
        some = ", ".join(sorted(found)[:5])
        raise WeightsError(f"{weights}: nothing there is taken by include={list(patterns)}: it has {some}")
    loadable = any(name in ("config.json", "params.json") or name.endswith(".gguf") for name in chosen)
    if not weights.include and not loadable:
        some = ", ".join(sorted(found)[:5])
        raise WeightsError(
            f"{weights}: there is no config.json, so no engine could load it: it has {some}; "
            f"name the folder of the model, or say what to take with include="
        )
    return tuple(found[name] for name in chosen)


def check_name(name: str, weights: Weights) -> None:
    """Raise WeightsError for a name that is no plain path below a folder."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise WeightsError(f"{weights}: it has a file {name!r}, whose name would leave its folder: nothing was taken")


def _default(names: Iterable[str]) -> tuple[str, ...]:
    usable = [name for name in names if not _matches(name, NEVER)]
    for pattern in FALLBACKS:
        if any(fnmatchcase(name, pattern) for name in usable):
            return (*NEEDED, pattern)
    return NEEDED


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
