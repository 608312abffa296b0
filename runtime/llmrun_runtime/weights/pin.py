"""A pin: the files behind a source's name at one moment. Also selects the files that an engine needs.

Pure: does no I/O.
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

# Files that engines read: https://huggingface.co/docs/hub/models-libraries and vLLM's loaders.
ENGINE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.spm", "*.vocab")
# Formats of weights in order of preference: only the first one found is fetched.
WEIGHT_FORMATS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
# Copies of the weights in formats for other programs, and leftovers of training.
SKIPPED = (
    *("original/*", "metal/*", "onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*", "runs/*", ".git*", "*/.git*"),
    *("*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*training_args.bin", "*optimizer.pt"),
    *("*scheduler.pt", "*scaler.pt", "*rng_state*.pth", "README*", "LICENSE*", "requirements*.txt"),
)
# All weights in one file; Mistral's repositories have it in addition to shards.
CONSOLIDATED = "consolidated*.safetensors"
MIRROR_MANIFEST = ".llmrun-weights.json"
"""The file of checksums that `llmrun weights mirror` writes to its target."""


class File(BaseModel):
    """One file of a source."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    """Path relative to the source, separated by `/`."""
    size: int
    """Bytes."""
    digests: dict[str, str] = {}
    """The store's checksums, hexadecimal, by algorithm: `sha256`, `md5`, `git` (SHA-1 of the git blob), `crc32c`."""
    version: str = ""
    """The store's version of the file: an ETag or a generation. Empty where the revision identifies it."""


class Pin(BaseModel):
    """The content of a source at one moment: a revision and its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: AnyWeights
    revision: str = ""
    """The commit on the Hub; empty for object stores, where each file has a version."""
    files: tuple[File, ...]
    imported: bool = False
    """Whether `llmrun weights import` created it; then it is not fetched from the source."""

    @cached_property
    def id(self) -> str:
        """A folder name, equal for two pins of the same bytes from the same source."""
        source = self.weights.repo if self.weights.kind == "hub" else self.weights.canonical
        files = [(f.name, f.size, sorted(f.digests.items()), f.version) for f in self.files]
        content = json.dumps([self.weights.endpoint_url, source, self.revision, files, self.imported])
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", source.rpartition("/")[2]).strip("-.")[:64] or "weights"
        return f"{slug}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    @property
    def total(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.size for file in self.files)

    @property
    def short(self) -> str:
        """A short revision for display: the commit, or a hash of the files."""
        hashed = self.id.rpartition("-")[2][:12]
        return f"imported {hashed}" if self.imported else self.revision[:12] or hashed


def select_files(files: Iterable[File], weights: Weights) -> tuple[File, ...]:
    """Return the files to fetch, sorted by name, following the source's `include` and `exclude`.

    Raises WeightsError for a file name outside the folder, and if no engine could load the selected files.
    """
    by_name = {file.name: file for file in files}
    for name in by_name:
        check_file_name(name, weights)
    if not by_name:
        raise WeightsError(f"{weights}: no files found at that address")
    patterns = weights.include or _default_patterns(by_name)
    skipped = () if weights.include else SKIPPED
    selected = sorted(
        name
        for name in by_name
        if name != MIRROR_MANIFEST and _matches(name, patterns) and not _matches(name, (*skipped, *weights.exclude))
    )
    sharded = any(name.endswith(".safetensors") and not fnmatchcase(name, CONSOLIDATED) for name in selected)
    if not weights.include and sharded:
        selected = [name for name in selected if not fnmatchcase(name, CONSOLIDATED)]
    examples = ", ".join(sorted(by_name)[:5])
    if not selected:
        raise WeightsError(f"{weights}: no file matches include={list(patterns)}; available: {examples}")
    loadable = any(name in ("config.json", "params.json") or name.endswith(".gguf") for name in selected)
    if not weights.include and not loadable:
        raise WeightsError(
            f"{weights}: config.json not found, so no engine can load it; available: {examples}. "
            f"Use the model's folder as the source, or select files with include="
        )
    return tuple(by_name[name] for name in selected)


def check_file_name(name: str, weights: Weights) -> None:
    """Raise WeightsError unless the name is a plain relative path below the folder."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise WeightsError(f"{weights}: invalid file name {name!r}: it is outside the folder. Nothing was fetched")


def _default_patterns(names: Iterable[str]) -> tuple[str, ...]:
    usable = [name for name in names if not _matches(name, SKIPPED)]
    for pattern in WEIGHT_FORMATS:
        if any(fnmatchcase(name, pattern) for name in usable):
            return (*ENGINE_FILES, pattern)
    return ENGINE_FILES


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
