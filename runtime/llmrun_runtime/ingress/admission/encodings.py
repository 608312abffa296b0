"""Decodes compressed request bodies (`Content-Encoding`), with a bound on the result. Pure."""

from __future__ import annotations

import sys
import zlib
from typing import Protocol

from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.errors import HTTPError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ENCODINGS = ("gzip", "deflate", "zstd")
_OTHER_NAMES = {"x-gzip": "gzip", "identity": ""}
MAX_STREAMS = 16
# Windows of more than 8 MiB need not be supported (RFC 9659).
_ZSTD_WINDOW_LOG = 23
_GZIP_WBITS = 16 + zlib.MAX_WBITS
_ZLIB_HEADER_BITS = 0x0F


class _Decompressor(Protocol):
    """What the decompressors of both libraries have in common."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""
        ...

    @property
    def unused_data(self) -> bytes:
        """The bytes after its end."""
        ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Return at most `max_length` bytes of the result."""
        ...


def content_encoding(scope: Scope) -> str:
    """Return the encoding of a request's body, one of ENCODINGS; "" for none. Raises HTTPError (415)."""
    value: str = dict(scope["headers"]).get(b"content-encoding", b"").decode("latin-1").strip().lower()
    name = _OTHER_NAMES.get(value, value)
    if name and name not in ENCODINGS:
        message = f"content encoding {value!r} is not supported: send one of {', '.join(ENCODINGS)}, or none"
        raise HTTPError(415, message, "unsupported_encoding")
    return name


def decode(content: bytes, encoding: str, limit: int) -> bytes:
    """Return the decoded body. Raises HTTPError: 413 above `limit` bytes, 400 if it is broken.

    No more than `limit` bytes are ever decoded, so that a small body cannot fill the memory.
    """
    parts: list[bytes] = []
    size = 0
    try:
        while content:  # both formats allow several streams in a row; each copies what follows it
            if len(parts) == MAX_STREAMS:
                raise EOFError(f"it has more than {MAX_STREAMS} streams")
            decompressor = _decompressor(encoding, content)
            part = decompressor.decompress(content, limit + 1 - size)
            size += len(part)
            if size > limit:
                message = f"request body is larger than {limit >> 20} MiB after decoding ({encoding})"
                raise HTTPError(413, message, "body_too_large")
            parts.append(part)
            if not decompressor.eof:
                raise EOFError("it ends too early")
            content = decompressor.unused_data if encoding != "deflate" else b""
    except (zlib.error, zstd.ZstdError, EOFError) as error:
        raise HTTPError(400, f"request body is not valid {encoding}: {error}", "invalid_encoding") from None
    return b"".join(parts)


def _decompressor(encoding: str, content: bytes) -> _Decompressor:
    if encoding == "zstd":
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})
    if encoding == "gzip":
        return zlib.decompressobj(_GZIP_WBITS)
    # "deflate" means zlib's format (RFC 9110, 8.4.1.2), but some clients send it without the header.
    has_header = content[0] & _ZLIB_HEADER_BITS == zlib.DEFLATED and int.from_bytes(content[:2]) % 31 == 0
    return zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
