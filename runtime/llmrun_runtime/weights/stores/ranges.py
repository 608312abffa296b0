"""Reads a range of bytes of a file over HTTP: what S3, GCS, the Hub and other nodes have in common.

Tells what may pass if asked again (Trouble) from what will not (WeightsError).
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
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
# Too many requests, and what servers answer when they are busy or restarting.
PASSING = frozenset({408, 429, 500, 502, 503, 504})
# S3's ETag: an MD5, or that of the parts' MD5s with their number. GCS's generation: a number.
VERSION = re.compile(r"[0-9a-f]{32}(-\d+)?|\d+")

# Where the stores' own packages look for certificates, before those that Python's HTTP clients bring.
AUTHORITIES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


class TransferError(Exception):
    """It did not work, and may work later; `after`: seconds that the server asks for."""

    def __init__(self, text: str, after: float = 0) -> None:
        super().__init__(text)
        self.after = after


class Reader(Protocol):
    """Something that has a source's files."""

    name: str
    unnamed: set[str]
    """Files whose ETag turned out to be no MD5, though it looks like one (encrypted with a key of KMS)."""

    def read(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """The file's bytes from `start` to `end`, in pieces. Raises Trouble or WeightsError."""
        ...


class Address(Protocol):
    """Where a file can be had."""

    name: str

    def locate(self, file: File, *, again: bool) -> tuple[str, dict[str, str]]:
        """A URL and headers for a GET; `again`: the last one was refused, it may be too old."""
        ...

    def explain(self, file: File, status: int) -> str:
        """What a final refusal means and what to do, in one line."""
        ...


class HttpReader:
    """Reads by ranged GETs. Any number of threads may use it at once."""

    def __init__(self, address: Address, connections: int, proxies: Mapping[str, str] | None = None) -> None:
        """`proxies`: by scheme; by default those of the environment."""
        self.name = address.name
        self.unnamed: set[str] = set()
        self._address = address
        options: dict[str, Any] = {
            "maxsize": connections,
            "timeout": urllib3.Timeout(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
            "ca_certs": next((os.environ[name] for name in AUTHORITIES if os.environ.get(name)), certifi.where()),
        }
        self._direct = urllib3.PoolManager(**options)
        said = urllib.request.getproxies() if proxies is None else proxies
        self._proxies = {
            scheme: _proxy(scheme, url, options) for scheme, url in said.items() if scheme in ("http", "https")
        }

    def read(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """See Reader."""
        for again in (False, True):
            url, headers = self._address.locate(file, again=again)
            answer = self._get(url, {**headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"})
            if answer.status in (401, 403) and not again:  # a signed address that has expired
                answer.close()
                continue
            break
        try:
            self._check(file, answer, start, end)
            left = end - start
            while left:
                piece = answer.read(min(left, CHUNK_BYTES))
                if not piece:
                    raise TransferError("the connection was closed early")
                left -= len(piece)
                yield piece
        except urllib3.exceptions.HTTPError as error:
            raise TransferError(f"{type(error).__name__}") from error
        finally:
            # A connection that still holds bytes of this answer is of no use to the next request.
            answer.release_conn() if not left_over(answer) else answer.close()

    def _get(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        parsed = urllib3.util.parse_url(url)
        bypass = urllib.request.proxy_bypass(parsed.host or "")
        pool = self._direct if bypass else self._proxies.get(parsed.scheme or "", self._direct)
        retries = urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=3, respect_retry_after_header=False)
        try:
            return pool.request("GET", url, headers=dict(headers), preload_content=False, retries=retries)
        except urllib3.exceptions.HTTPError as error:
            host = parsed.netloc or url
            raise TransferError(f"no answer from {host} ({type(error.__cause__ or error).__name__})") from error

    def _check(self, file: File, answer: urllib3.BaseHTTPResponse, start: int, end: int) -> None:
        status = answer.status
        if status in PASSING:
            raise TransferError(f"the server answered {status}", _seconds(answer.headers.get("Retry-After", "")))
        if status in (412, 416):
            raise WeightsError(f"{file.name} has changed at {self.name} since it was pinned: deploy again")
        if status not in (200, 206):
            raise WeightsError(self._address.explain(file, status))
        found = re.match(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if not found:  # the server does not know ranges: good enough for a file's beginning
            if start or answer.headers.get("Content-Length", str(file.size)) != str(file.size):
                raise WeightsError(
                    f"{file.name}: {self.name} does not give parts of files, or another size than before"
                )
        elif int(found[1]) != start or int(found[2]) != end - 1 or found[3] not in ("*", str(file.size)):
            raise WeightsError(
                f"{file.name} has changed at {self.name} since it was pinned (another size): deploy again"
            )
        # https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html: ETag
        encrypted = answer.headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
        if encrypted or "x-amz-server-side-encryption-customer-algorithm" in answer.headers:
            self.unnamed.add(file.name)
        # S3 says its ETag, GCS its generation; other servers' ETags are no versions that a pin has.
        said = answer.headers.get("x-goog-generation") or answer.headers.get("ETag", "").strip('"')
        if VERSION.fullmatch(file.version) and VERSION.fullmatch(said) and said != file.version:
            raise WeightsError(f"{file.name} has changed at {self.name} since it was pinned: deploy again")


def _proxy(scheme: str, url: str, options: dict[str, Any]) -> urllib3.ProxyManager:
    """A pool behind the proxy that the environment names. Raises WeightsError."""
    parsed = urllib3.util.parse_url(url)
    headers = urllib3.make_headers(proxy_basic_auth=parsed.auth) if parsed.auth else None
    try:
        return urllib3.ProxyManager(url, proxy_headers=headers, **options)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise WeightsError(f"{scheme}_proxy={url!r} is of no use here ({error}): write http://host:port") from None


def left_over(answer: urllib3.BaseHTTPResponse) -> bool:
    """Whether an answer's body was not read to its end."""
    return bool(answer.length_remaining)


def _seconds(text: str) -> float:
    return min(float(text), 60) if text.isdigit() else 0
