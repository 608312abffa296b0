"""Checksums of files, in the algorithms that stores have: sha256, md5, git (a blob's SHA-1), crc32c."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

# Those that name bytes: two files of equal digest are the same. crc32c only finds damage.
NAMING = ("sha256", "md5", "git")
CHUNK_BYTES = 2**20


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


class Digester:
    """Hashes the bytes of one file, as they come, in what is needed to name and to check them.

    That is one algorithm where the store names the bytes by one, else sha256 (and crc32c, if the store has that).
    """

    def __init__(self, known: Mapping[str, str], size: int) -> None:
        naming = next((name for name in NAMING if name in known), "sha256")
        names = [naming, "crc32c"] if naming not in known and "crc32c" in known else [naming]
        self._hashes = {name: _new(name, size) for name in names}

    def update(self, data: Any) -> None:
        """Take the file's next bytes."""
        for value in self._hashes.values():
            value.update(data)

    def digests(self) -> dict[str, str]:
        """By algorithm, in hexadecimal."""
        return {name: value.hexdigest() for name, value in self._hashes.items()}


def _new(name: str, size: int) -> _Hash:
    if name == "git":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if name == "crc32c":
        return _Crc32c()
    return hashlib.new(name, usedforsecurity=False)


class _Crc32c:
    def __init__(self) -> None:
        from google_crc32c import Checksum  # noqa: PLC0415 - gcsfs brings it, and only GCS gives this checksum

        self._checksum = Checksum()

    def update(self, data: Any) -> None:
        self._checksum.update(bytes(data))

    def hexdigest(self) -> str:
        return bytes(self._checksum.digest()).hex()


def mismatch(found: Mapping[str, str], known: Mapping[str, str]) -> str:
    """What differs, in words; "" if all that both have is equal."""
    for name in found.keys() & known.keys():
        if found[name] != known[name]:
            return f"{name} is {found[name]}, not {known[name]}"
    return ""


def digests_of(path: Path, known: Mapping[str, str]) -> dict[str, str]:
    """The digests of a file on disk, in the algorithms of `known`. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        digester = Digester(known, path.stat().st_size)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while count := file.readinto(buffer):
            digester.update(buffer[:count])
    return digester.digests()


def blob_name(digests: Mapping[str, str]) -> str:
    """The name that bytes of these digests have in the cache: `sha256-…`."""
    name = next(name for name in NAMING if name in digests)
    return f"{name}-{digests[name]}"


def blob_names(digests: Mapping[str, str]) -> Iterable[str]:
    """All the names that such bytes may have there."""
    return (f"{name}-{digests[name]}" for name in NAMING if name in digests)
