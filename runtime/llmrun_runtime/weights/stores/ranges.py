"""Read a range of a file's bytes over HTTP, from S3, GCS, the Hub or another node.

Separates errors worth a retry (TransferError) from final ones (WeightsError).
"""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import certifi
import urllib3

from llmrun.errors import WeightsError
from llmrun_runtime.weights.pin import File

CHUNK_BYTES = 2**20
TIMEOUT_S = 10  # to connect, and for each read
# Too many requests, and the answers of servers that are busy or restarting.
RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
# S3's ETag: an MD5, or the MD5 of the parts' MD5s with their number. GCS's generation: a number.
VERSION = re.compile(r"[0-9a-f]{32}(-\d+)?|\d+")

# The variables that the stores' own packages read for certificates, before certifi's.
CA_BUNDLE_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


class TransferError(Exception):
    """A temporary failure. `retry_after`: seconds that the server requests before a retry."""

    def __init__(self, text: str, retry_after: float = 0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Reader(Protocol):
    """A place to read a source's files from."""

    name: str
    not_md5: set[str]
    """Files whose ETag only looks like an MD5 (encrypted with a KMS key)."""

    def read(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `end` in chunks. Raises TransferError or WeightsError."""
        ...


class Locator(Protocol):
    """Resolves a file to a URL."""

    name: str

    def locate(self, file: File, *, refresh: bool) -> tuple[str, dict[str, str]]:
        """Return a URL and headers for a GET. `refresh`: the last URL was rejected and may have expired."""
        ...

    def explain(self, file: File, status: int) -> str:
        """Return one line for a final HTTP status: what it means and what to do."""
        ...


class HttpReader:
    """Reads by ranged GETs. Safe to share between threads."""

    def __init__(
        self,
        locator: Locator,
        connections: int,
        proxies: Mapping[str, str] | None = None,
        *,
        is_store: bool = True,
    ) -> None:
        """`proxies`: by scheme; by default those of the environment. `is_store`: False for another node."""
        self._is_store = is_store
        self.name = locator.name
        self.not_md5: set[str] = set()
        self._locator = locator
        options: dict[str, Any] = {
            "maxsize": connections,
            "timeout": urllib3.Timeout(TIMEOUT_S),
            "ca_certs": next(
                (os.environ[name] for name in CA_BUNDLE_VARIABLES if os.environ.get(name)), certifi.where()
            ),
        }
        self._direct = urllib3.PoolManager(**options)
        urls = urllib.request.getproxies() if proxies is None else proxies
        self._proxies = {
            scheme: _proxy(scheme, url, options) for scheme, url in urls.items() if scheme in ("http", "https")
        }

    def read(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """See Reader."""
        for refresh in (False, True):
            url, headers = self._locator.locate(file, refresh=refresh)
            response = self._get(url, {**headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"})
            if response.status in (401, 403) and not refresh:  # a signed URL that has expired
                response.close()
                continue
            break
        try:
            self._check(file, response, start, end)
            remaining = end - start
            while remaining:
                chunk = response.read(min(remaining, CHUNK_BYTES))
                if not chunk:
                    raise TransferError("the connection was closed early")
                remaining -= len(chunk)
                yield chunk
        except urllib3.exceptions.HTTPError as error:
            raise TransferError(f"{type(error).__name__}") from error
        finally:
            # A connection with unread bytes of this response cannot serve the next request.
            if response.length_remaining == 0:
                response.drain_conn()  # an empty body must be read too before the connection is reused
                response.release_conn()
            else:
                response.close()

    def _get(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        parsed = urllib3.util.parse_url(url)
        bypass = urllib.request.proxy_bypass(parsed.host or "")
        pool = self._direct if bypass else self._proxies.get(parsed.scheme or "", self._direct)
        retries = urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=3, respect_retry_after_header=False)
        try:
            return pool.request("GET", url, headers=dict(headers), preload_content=False, retries=retries)
        except urllib3.exceptions.HTTPError as error:
            host = parsed.netloc or url
            raise TransferError(f"no response from {host} ({type(error.__cause__ or error).__name__})") from error

    def _check(self, file: File, response: urllib3.BaseHTTPResponse, start: int, end: int) -> None:
        status = response.status
        if status in RETRYABLE:
            raise TransferError(f"HTTP status {status}", _seconds(response.headers.get("Retry-After", "")))
        if status in (412, 416):
            raise self._changed(file)
        if status not in (200, 206):
            raise WeightsError(self._locator.explain(file, status))
        content_range = re.match(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not content_range:  # a server without range support can still send a file from its beginning
            if start or response.headers.get("Content-Length", str(file.size)) != str(file.size):
                raise WeightsError(f"{file.name}: {self.name} does not support range requests, or the size has changed")
        elif (
            int(content_range[1]) != start
            or int(content_range[2]) != end - 1
            or content_range[3] not in ("*", str(file.size))
        ):
            raise self._changed(file)
        # https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html: ETag
        encrypted = response.headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
        encrypted = encrypted or "x-amz-server-side-encryption-customer-algorithm" in response.headers
        if encrypted and self._is_store:  # no other node can switch off a check
            self.not_md5.add(file.name)
        # S3 sends its ETag, GCS its generation; the ETags of other servers are not in a pin.
        version = response.headers.get("x-goog-generation") or response.headers.get("ETag", "").strip('"')
        if VERSION.fullmatch(file.version) and VERSION.fullmatch(version) and version != file.version:
            raise self._changed(file)

    def _changed(self, file: File) -> WeightsError:
        return WeightsError(f"{file.name} has changed at {self.name} since it was pinned: deploy again")


def _proxy(scheme: str, url: str, options: dict[str, Any]) -> urllib3.ProxyManager:
    """Return a pool for the proxy in the environment. Raises WeightsError."""
    parsed = urllib3.util.parse_url(url)
    headers = urllib3.make_headers(proxy_basic_auth=parsed.auth) if parsed.auth else None
    try:
        return urllib3.ProxyManager(url, proxy_headers=headers, **options)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise WeightsError(
            f"invalid value {scheme}_proxy={url!r} ({error}): it must be like http://host:port"
        ) from None


def _seconds(text: str) -> float:
    return min(float(text), 60) if text.isdigit() else 0
