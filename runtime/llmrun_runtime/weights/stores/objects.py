"""S3, GCS and every other object store with an fsspec package: listing and uploads through fsspec.

S3 and GCS are read by ranged GETs from URLs that s3fs and gcsfs make, others by fsspec
(docs/explanation/decisions.md says why).
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
from llmrun_runtime.weights.pin import MIRROR_MANIFEST, File, Pin, select_files
from llmrun_runtime.weights.stores.base import may_send
from llmrun_runtime.weights.stores.ranges import CHUNK_BYTES, HttpReader, Reader, TransferError

SIGNED_URL_S = 3600
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


class _AccessDeniedError(WeightsError):
    pass


class ObjectStore:
    """One prefix of a bucket, or one folder."""

    def __init__(self, weights: Weights, connections: int) -> None:
        self.name = str(weights)
        self.not_md5: set[str] = set()
        self._weights = weights
        try:
            self.fs: Any = open_filesystem(weights.protocol, weights.endpoint_url, anonymous=weights.anonymous)
        except ImportError as error:
            advice = INSTALL.get(weights.protocol) or str(error).splitlines()[0]
            raise WeightsError(
                f"{weights}: {weights.protocol}:// needs a package that is not installed: {advice}"
            ) from None
        except ValueError:
            raise WeightsError(
                f"{weights}: {weights.protocol}:// is not supported by llmrun or any installed fsspec package"
            ) from None
        except Exception as error:
            raise self._translated(error) from error
        self.root = self.fs._strip_protocol(f"{weights.protocol}://{weights.address}").rstrip("/")
        self.reader: Reader = self
        if weights.protocol in ("s3", "gs"):
            self.reader = HttpReader(self, connections)

    def pin(self) -> Pin:
        """See Store."""
        listing = self.list_files()
        return listing.model_copy(update={"files": select_files(listing.files, self._weights)})

    def list_files(self) -> Pin:
        """See Store."""
        found = self.files()
        sums = self.mirror_digests() if any(file.name == MIRROR_MANIFEST for file in found) else {}
        files = [
            file.model_copy(update={"digests": {**file.digests, **sums.get((file.name, file.version), {})}})
            for file in found
        ]
        return Pin(weights=self._weights, files=tuple(files))

    def files(self) -> list[File]:
        """Return all files below the address. Raises WeightsError."""
        if self._weights.path and not Path(self.root).is_dir():
            raise WeightsError(f"{self._weights}: folder not found")
        try:
            self.fs.invalidate_cache()
            infos = self.fs.find(self.root, detail=True)
        except Exception as error:
            raise self._translated(error) from error
        start = len(self.root) + 1
        files = [
            _to_file(name[start:], info)
            for name, info in infos.items()
            if info["type"] == "file" and name.startswith(self.root + "/") and not name.endswith("/")
        ]
        sizeless = next((name for name, info in infos.items() if info["type"] == "file" and info["size"] is None), None)
        if sizeless:
            raise WeightsError(f"{self._weights}: the store reports no size for {sizeless}: use another kind of store")
        return files

    def mirror_digests(self) -> dict[tuple[str, str], dict[str, str]]:
        """Return the checksums that `llmrun weights mirror` wrote, by file name and version. Raises WeightsError."""
        try:
            files = json.loads(self.fs.cat_file(f"{self.root}/{MIRROR_MANIFEST}"))["files"]
            return {(f["name"], f["version"]): dict(f["digests"]) for f in files}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{self._weights}: cannot read {MIRROR_MANIFEST} ({error}): mirror it again") from None

    def put(self, path: Path, name: str) -> None:
        """Upload a file. Raises WeightsError."""
        # s3fs uploads ten parts of 50 MiB at once by default.
        options = {"chunksize": UPLOAD_PART_BYTES, "max_concurrency": 2} if self._weights.protocol == "s3" else {}
        try:
            self.fs.put_file(str(path), f"{self.root}/{name}", **options)
        except Exception as error:
            raise self._translated(error) from error

    def write(self, name: str, data: bytes) -> None:
        """Upload a small file. Raises WeightsError."""
        try:
            self.fs.pipe_file(f"{self.root}/{name}", data)
        except Exception as error:
            raise self._translated(error) from error

    def check_published(self) -> None:
        """See Store: there are no revisions."""

    def use_pin(self, pin: Pin) -> None:
        """Do nothing: each file has its own version."""

    def local_copy(self, file: File) -> Path | None:
        """Return None: object stores have no cache on the node."""
        return None

    def locate(self, file: File, *, refresh: bool) -> tuple[str, dict[str, str]]:
        """A signed URL (S3), or the pinned version's URL with credentials in the headers (GCS). See Locator."""
        path = f"{self.root}/{file.name}"
        try:
            if self._weights.protocol == "s3":
                return str(self.fs.sign(path, expiration=SIGNED_URL_S)), {}
            headers: dict[str, str] = {}
            self.fs.credentials.apply(headers)
            return str(self.fs.url(path, generation=file.version or None)), headers
        except Exception as error:
            translated = self._translated(error)
            if isinstance(translated, _AccessDeniedError):
                raise translated from error
            raise TransferError(str(translated)) from error

    def explain(self, file: File, status: int) -> str:
        """See Locator."""
        if status == 404:
            return f"{self.name}: {file.name} was replaced or removed since it was pinned: deploy again"
        return f"{self.name}: cannot read {file.name} (HTTP status {status}): {self._advice()}"

    def read(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """Read through fsspec, for stores that are not read by URL. See Reader."""
        path = f"{self.root}/{file.name}"
        try:
            if _to_file(file.name, self.fs.info(path)).version != file.version:
                raise WeightsError(f"{file.name} has changed at {self.name} since it was pinned: deploy again")
            for at in range(start, end, CHUNK_BYTES):
                chunk_end = min(at + CHUNK_BYTES, end)
                chunk = self.fs.cat_file(path, start=at, end=chunk_end)
                if len(chunk) != chunk_end - at:
                    raise TransferError(f"the store sent {len(chunk)} bytes instead of {chunk_end - at}")
                yield chunk
        except (TransferError, WeightsError, GeneratorExit):
            raise
        except FileNotFoundError:
            raise WeightsError(self.explain(file, 404)) from None
        except PermissionError as error:
            raise self._translated(error) from error
        except Exception as error:  # each fsspec package has its own errors
            raise TransferError(f"{type(error).__name__}: {error}") from error

    def _translated(self, error: Exception) -> WeightsError:
        """Translate an exception of an fsspec package."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
        if isinstance(error, FileNotFoundError):
            return WeightsError(f"{self._weights}: address not found")
        words = ("credential", "forbidden", "accesskey", "signature", "anonymous caller", "unauthorized", "403", "401")
        if isinstance(error, PermissionError) or any(word in text.lower() for word in words):
            return _AccessDeniedError(f"{self._weights}: access denied ({text}): {self._advice()}")
        return WeightsError(f"{self._weights}: cannot reach the store ({text})")

    def _advice(self) -> str:
        variables = CREDENTIALS.get(self._weights.protocol, f"the credentials of {self._weights.protocol}://")
        return f"set {variables} (on the node, or with env=)"


@functools.cache
def open_filesystem(protocol: str, endpoint_url: str, *, anonymous: bool) -> Any:
    """Return the fsspec filesystem of a source, with credentials from the environment.

    Cached per process: creating one takes as long as fetching an adapter. Raises ImportError, ValueError for an
    unknown protocol, and the package's own errors.
    """
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "s3":
        region = os.environ.get("AWS_REGION")  # botocore does not read it
        if region:
            options["client_kwargs"] = {"region_name": region}
        if endpoint_url:
            options["endpoint_url"] = endpoint_url
        else:
            options["cache_regions"] = True  # a signed URL is valid in the bucket's region only
        if anonymous:
            options["anon"] = True
        else:
            options["config_kwargs"] = {"signature_version": "s3v4"}
    elif protocol == "gs":
        # Otherwise gcsfs requests each bucket's type over gRPC: a minute's timeout where only HTTP passes.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        if endpoint_url:
            options["endpoint_url"] = endpoint_url
        if anonymous or not may_send(endpoint_url, "GOOGLE_APPLICATION_CREDENTIALS"):
            options["token"] = "anon"
    return fsspec.filesystem(protocol, **options)


def _to_file(name: str, info: dict[str, Any]) -> File:
    """Convert an entry of a listing; each store has its own keys."""
    etag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    digests = {}
    if ETAG_IS_MD5.fullmatch(etag):
        digests["md5"] = etag
    for key, algorithm in (("md5Hash", "md5"), ("crc32c", "crc32c")):
        if info.get(key):
            digests[algorithm] = base64.b64decode(info[key]).hex()
    version = str(info.get("generation") or etag or info.get("mtime") or info.get("LastModified") or "")
    return File(name=name, size=int(info.get("size") or 0), digests=digests, version=version)
