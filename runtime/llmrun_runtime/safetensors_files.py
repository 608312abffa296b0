"""Reads the headers of safetensors files. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

# https://github.com/huggingface/safetensors#format
LENGTH_BYTES, MAX_HEADER_BYTES = 8, 100 * 2**20
Shapes = dict[str, tuple[int, ...]]


def read_shapes(file: Path) -> Shapes:
    """Return the shapes of a safetensors file's tensors. Raises OSError; ValueError if it is invalid or truncated."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if not 0 < length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError("it has no safetensors header")
        header = json.loads(opened.read(length))
    try:
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except (AttributeError, LookupError, TypeError):
        raise ValueError("it has an invalid safetensors header") from None
    if LENGTH_BYTES + length + end != size:
        raise ValueError(f"it has {size} bytes, expected {LENGTH_BYTES + length + end}")
    return shapes


def find_damaged(files: Iterable[Path]) -> str:
    """Return which of the files is a damaged safetensors file, and how; "" if none is."""
    for file in files:
        if file.suffix == ".safetensors":
            try:
                read_shapes(file)
            except OSError as error:
                return f"{file} cannot be read: {error.strerror}"
            except ValueError as error:
                return f"{file} is damaged: {error}"
    return ""
