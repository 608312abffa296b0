"""S3, GCS and every other store that has an fsspec package: listing through fsspec, bytes by ranges.

S3 and GCS are read over HTTP from addresses that s3fs and gcsfs give (docs/performance.md says why); others by fsspec.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from llmrun.errors import WeightsError
from llmrun.weights import Weights
from llmrun_runtime.weights.pin import MANIFEST, File, Pin, choose
from llmrun_runtime.weights.stores.ranges import CHUNK_BYTES, HttpReader, Reader, TransferError

SIGNED_S = 3600
UPLOAD_PART_BYTES = 16 * 2**20
INSTALL = {
    "s3": "pip install 'llmrun[s3]'",
    "gs": "pip install 'llmrun[gcs]'",
    "az": "pip install adlfs",
    "abfs": "pip install adlfs",
    "oss": "pip install ossfs",
    "oci": "pip install ocifs",
    "sftp": "pip install paramiko",
}
ETAG_IS_MD5 = re.compile(r"[0-9a-f]{32}")
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws), or write s3://anonymous@…",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or write gs://anonymous@…",
}


class ObjectStore:
    """One prefix of a bucket, or one folder."""

    def __init__(self, weights: Weights, connections: int) -> None:
        self.name = str(weights)
        self.unnamed: set[str] = set()
        self._weights = weights
        try:
            self.fs: Any = open_filesystem(weights.protocol, weights.endpoint_url, anonymous=weights.anonymous)
        except ImportError as error:
            line = INSTALL.get(weights.protocol) or str(error).splitlines()[0]
            raise WeightsError(
                f"{weights}: {weights.protocol}:// needs a package that is not installed: {line}"
            ) from None
        except ValueError:
            raise WeightsError(
                f"{weights}: neither llmrun nor an installed fsspec package knows {weights.protocol}://"
            ) from None
        except Exception as error:
            raise self._wrong(error) from error
        self.root = self.fs._strip_protocol(f"{weights.protocol}://{weights.address}").rstrip("/")
        self.reader: Reader = self
        if weights.protocol in ("s3", "gs"):
            self.reader = HttpReader(self, connections)

    def pin(self) -> Pin:
        """What lies there now. Raises WeightsError."""
        listed = self.listed()
        return listed.model_copy(update={"files": choose(listed.files, self._weights)})

    def listed(self) -> Pin:
        """See Store."""
        found = self.files()
        sums = self.mirrored() if any(file.name == MANIFEST for file in found) else {}
        files = [
            file.model_copy(update={"digests": {**file.digests, **sums.get((file.name, file.version), {})}})
            for file in found
        ]
        return Pin(weights=self._weights, files=tuple(files))

    def files(self) -> list[File]:
        """All files below the address. Raises WeightsError."""
        if self._weights.path and not Path(self.root).is_dir():
            raise WeightsError(f"{self._weights}: there is no such folder")
        try:
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
        except Exception as error:
            raise self._wrong(error) from error
        start = len(self.root) + 1
        files = [
            _file(name[start:], info)
            for name, info in found.items()
            if info["type"] == "file" and name.startswith(self.root + "/") and not name.endswith("/")
        ]
        unknown = next((name for name, info in found.items() if info["type"] == "file" and info["size"] is None), None)
        if unknown:
            raise WeightsError(f"{self._weights}: it does not say how large {unknown} is: use another kind of store")
        return files

    def mirrored(self) -> dict[tuple[str, str], dict[str, str]]:
        """Checksums that `llmrun weights mirror` left, by the name and the version that it saw. Raises WeightsError."""
        try:
            files = json.loads(self.fs.cat_file(f"{self.root}/{MANIFEST}"))["files"]
            return {(f["name"], f["version"]): dict(f["digests"]) for f in files}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{self._weights}: its {MANIFEST} cannot be read ({error}): mirror it again") from None

    def put(self, path: Path, name: str) -> None:
        """Upload a file. Raises WeightsError."""
        # s3fs takes 50 MiB a part and ten at once if not told otherwise.
        options = {"chunksize": UPLOAD_PART_BYTES, "max_concurrency": 2} if self._weights.protocol == "s3" else {}
        try:
            self.fs.put_file(str(path), f"{self.root}/{name}", **options)
        except Exception as error:
            raise self._wrong(error) from error

    def write(self, name: str, data: bytes) -> None:
        """Upload a small file. Raises WeightsError."""
        try:
            self.fs.pipe_file(f"{self.root}/{name}", data)
        except Exception as error:
            raise self._wrong(error) from error

    def use(self, pin: Pin) -> None:
        """Nothing to do: each file has its version."""

    def local(self, file: File) -> Path | None:
        """No store has a cache of its own here."""
        return None

    def locate(self, file: File, *, again: bool) -> tuple[str, dict[str, str]]:
        """A signed address (S3), or one for the version that was pinned, with credentials in the headers (GCS)."""
        path = f"{self.root}/{file.name}"
        try:
            if self._weights.protocol == "s3":
                return str(self.fs.sign(path, expiration=SIGNED_S)), {}
            headers: dict[str, str] = {}
            self.fs.credentials.apply(headers)
            return str(self.fs.url(path, generation=file.version or None)), headers
        except Exception as error:
            wrong = self._wrong(error)
            if "access denied" in str(wrong):
                raise wrong from error
            raise TransferError(str(wrong)) from error

    def explain(self, file: File, status: int) -> str:
        """See Address."""
        if status == 404:
            return f"{self.name}: {file.name} has been replaced or removed since it was pinned: deploy again"
        return f"{self.name}: {file.name} cannot be read (the store answered {status}): {self._advice()}"

    def read(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """Through fsspec, for stores that have no address of ours. See Reader."""
        path = f"{self.root}/{file.name}"
        try:
            if _file(file.name, self.fs.info(path)).version != file.version:
                raise WeightsError(f"{file.name} has changed at {self.name} since it was pinned: deploy again")
            for at in range(start, end, CHUNK_BYTES):
                wanted = min(at + CHUNK_BYTES, end)
                piece = self.fs.cat_file(path, start=at, end=wanted)
                if len(piece) != wanted - at:
                    raise TransferError(f"it sent {len(piece)} bytes where {wanted - at} were asked for")
                yield piece
        except (TransferError, WeightsError, GeneratorExit):
            raise
        except FileNotFoundError:
            raise WeightsError(self.explain(file, 404)) from None
        except PermissionError as error:
            raise self._wrong(error) from error
        except Exception as error:  # each package has its own
            raise TransferError(f"{type(error).__name__}: {error}") from error

    def _wrong(self, error: Exception) -> WeightsError:
        """What a store's own exception means."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
        if isinstance(error, FileNotFoundError):
            return WeightsError(f"{self._weights}: there is nothing at that address")
        words = ("credential", "forbidden", "accesskey", "signature", "anonymous caller", "unauthorized", "403", "401")
        if isinstance(error, PermissionError) or any(word in text.lower() for word in words):
            return WeightsError(f"{self._weights}: access denied ({text}): {self._advice()}")
        return WeightsError(f"{self._weights}: the store cannot be asked ({text})")

    def _advice(self) -> str:
        variables = CREDENTIALS.get(self._weights.protocol, f"the credentials of {self._weights.protocol}://")
        return f"set {variables} (on the node, or with env=)"


@functools.cache
def open_filesystem(protocol: str, endpoint_url: str, *, anonymous: bool) -> Any:
    """The fsspec filesystem of a source; credentials come from the environment. Raises ImportError and what it may.

    One for all sources of that kind in this process: making one takes as long as fetching an adapter.
    """
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "s3":
        region = os.environ.get("AWS_REGION")  # which botocore does not read
        if region:
            options["client_kwargs"] = {"region_name": region}
        if endpoint_url:
            options["endpoint_url"] = endpoint_url
        else:
            options["cache_regions"] = True  # a signed address is only good in the bucket's own region
        if anonymous:
            options["anon"] = True
        else:
            options["config_kwargs"] = {"signature_version": "s3v4"}
    elif protocol == "gs":
        # Else gcsfs asks for each bucket's kind over gRPC: a minute, where only HTTP comes through.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        if endpoint_url:
            options["endpoint_url"] = endpoint_url
        if anonymous:
            options["token"] = "anon"
    return fsspec.filesystem(protocol, **options)


def _file(name: str, info: dict[str, Any]) -> File:
    """What a listing says of a file, in one shape."""
    etag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    digests = {}
    if ETAG_IS_MD5.fullmatch(etag):
        digests["md5"] = etag
    for key, algorithm in (("md5Hash", "md5"), ("crc32c", "crc32c")):
        if info.get(key):
            digests[algorithm] = base64.b64decode(info[key]).hex()
    version = str(info.get("generation") or etag or info.get("mtime") or info.get("LastModified") or "")
    return File(name=name, size=int(info.get("size") or 0), digests=digests, version=version)
