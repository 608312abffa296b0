"""Checksums of files, in the algorithms that stores use: sha256, md5, git (a blob's SHA-1), crc32c."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

# Digests that identify content: two files with equal ones are the same. crc32c only detects damage.
IDENTIFYING = ("sha256", "md5", "git")
CHUNK_BYTES = 2**20


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


class Digester:
    """Hashes one file's bytes as they arrive, in the algorithms needed to identify and check them.

    One algorithm if `expected` has an identifying one; otherwise sha256, and crc32c if the store has it.
    """

    def __init__(self, expected: Mapping[str, str], size: int) -> None:
        identifying = next((name for name in IDENTIFYING if name in expected), "sha256")
        names = [identifying, "crc32c"] if identifying not in expected and "crc32c" in expected else [identifying]
        self._hashes = {name: _new_hash(name, size) for name in names}

    def update(self, data: Any) -> None:
        """Hash the file's next bytes."""
        for value in self._hashes.values():
            value.update(data)

    def digests(self) -> dict[str, str]:
        """Return the digests in hexadecimal, by algorithm."""
        return {name: value.hexdigest() for name, value in self._hashes.items()}


def _new_hash(name: str, size: int) -> _Hash:
    if name == "git":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if name == "crc32c":
        return _Crc32c()
    return hashlib.new(name, usedforsecurity=False)


class _Crc32c:
    def __init__(self) -> None:
        from google_crc32c import Checksum  # noqa: PLC0415 - installed with gcsfs; only GCS uses this checksum

        self._checksum = Checksum()

    def update(self, data: Any) -> None:
        self._checksum.update(bytes(data))

    def hexdigest(self) -> str:
        return bytes(self._checksum.digest()).hex()


def mismatch(actual: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """Describe the first difference between digests; "" if all that both contain are equal."""
    for name in actual.keys() & expected.keys():
        if actual[name] != expected[name]:
            return f"{name} is {actual[name]}, not {expected[name]}"
    return ""


def hash_file(path: Path, expected: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of a file on disk, in the algorithms of `expected` (see Digester). Raises OSError."""
    with path.open("rb", buffering=0) as file:
        digester = Digester(expected, path.stat().st_size)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while count := file.readinto(buffer):
            digester.update(buffer[:count])
    return digester.digests()


def blob_name(digests: Mapping[str, str]) -> str:
    """Return the cache's name for bytes with these digests: `sha256-…`."""
    name = next(name for name in IDENTIFYING if name in digests)
    return f"{name}-{digests[name]}"


def blob_names(digests: Mapping[str, str]) -> Iterable[str]:
    """Return every name that the cache may have for these bytes."""
    return (f"{name}-{digests[name]}" for name in IDENTIFYING if name in digests)
