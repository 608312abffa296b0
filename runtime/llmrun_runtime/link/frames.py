"""The wire format of a link: frames of many requests on one TCP connection.

A frame is the length of its payload (4 bytes), its request number (4), its kind (1) and the payload. All frames queued
in one turn of the event loop are written at once, so the tokens that an engine produces in one step cost one write and
one read in total, not one each. In a long turn, with many new requests, they are written meanwhile: the other end can
work on the first ones. Standard library only: engines import this module.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from typing import Any, cast

# From the ingress: HEADERS (JSON: method, path, query, headers) and BODY, then END, or CANCEL if the client left.
# From the engine: HEADERS (JSON: status, headers) and BODY, then END, or FAILED if the engine's app raised.
HEADERS, BODY, END, CANCEL, FAILED = 1, 2, 3, 4, 5
# From the ingress: the client reads slower than the engine writes (PAUSE), or has caught up (RESUME).
PAUSE, RESUME = 6, 7

_PREFIX = struct.Struct("!IIB")
# Bodies are sent in chunks, so that a large one does not delay other requests.
CHUNK_BYTES = 2**16
# HEADERS is always one frame, so this also limits the size of headers.
MAX_PAYLOAD_BYTES = 2**18
BATCH_BYTES = 2**18
BATCH_S = 0.0005


def new_socket(host: str) -> socket.socket:
    """Return a socket that detects a dead peer within about 30 s; sockets that it accepts inherit this."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock


class Link(asyncio.Protocol):
    """One end of a connection. Subclasses implement `on_frame` and `on_close`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unparsed = b""
        self._outgoing: list[bytes] = []
        self._outgoing_bytes = 0
        self._outgoing_since = 0.0
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def open(self) -> bool:
        """Whether frames can still be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def on_frame(self, number: int, kind: int, payload: bytes) -> None:
        """Handle a received frame. If it raises ValueError, the connection is closed."""
        raise NotImplementedError

    def on_close(self) -> None:
        """Handle the end of the connection."""
        raise NotImplementedError

    def send_frame(self, number: int, kind: int, payload: bytes = b"") -> None:
        """Queue a frame until the end of this turn of the event loop; do nothing on a closed connection.

        Write what is queued at BATCH_BYTES, and if it has waited for BATCH_S.
        """
        now = time.perf_counter()
        if not self._outgoing:
            self._loop.call_soon(self._flush)
            self._outgoing_since = now
        self._outgoing.append(_PREFIX.pack(len(payload), number, kind) + payload)
        self._outgoing_bytes += len(payload)
        if self._outgoing_bytes >= BATCH_BYTES or now - self._outgoing_since > BATCH_S:
            self._flush()

    def send_headers(self, number: int, value: Any) -> None:
        """Queue a HEADERS frame. Raises ValueError above MAX_PAYLOAD_BYTES: the peer would close the connection."""
        payload = json.dumps(value, separators=(",", ":")).encode()
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"headers are larger than {MAX_PAYLOAD_BYTES >> 10} KiB")
        self.send_frame(number, HEADERS, payload)

    async def send_body(self, number: int, body: bytes) -> None:
        """Send bytes of a body as fast as the peer reads them."""
        for at in range(0, len(body), CHUNK_BYTES):
            self.send_frame(number, BODY, body[at : at + CHUNK_BYTES])
            if not self._writable.is_set():
                await self._writable.wait()

    def close(self) -> None:
        """Close the connection at once."""
        if self._transport:
            self._transport.abort()

    def _flush(self) -> None:
        outgoing, self._outgoing, self._outgoing_bytes = self._outgoing, [], 0
        if outgoing and self._transport and not self._transport.is_closing():
            self._transport.write(b"".join(outgoing))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        data = self._unparsed + data
        at, end = 0, len(data)
        while end - at >= _PREFIX.size:
            length, number, kind = _PREFIX.unpack_from(data, at)
            stop = at + _PREFIX.size + length
            if length > MAX_PAYLOAD_BYTES:
                self.close()
                return
            if stop > end:
                break
            try:
                self.on_frame(number, kind, data[at + _PREFIX.size : stop])
            except ValueError:
                self.close()
                return
            at = stop
        self._unparsed = data[at:]

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._writable.set()
        self.on_close()
