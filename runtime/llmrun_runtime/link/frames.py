"""The wire of a link: frames of many requests on one TCP connection.

A frame is the length of its payload (4 bytes), the number of its request (4), its kind (1) and the payload. Frames that
are said in one turn of the event loop leave in one piece, so that the tokens which an engine makes in one step cost one
write and one read together, not one each. Standard library only: half of it runs in engines.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any, cast

# From the ingress: a request (JSON: method, path, query, headers), its body; then END, or GONE once its caller left.
# From the engine: the answer's status and headers (JSON), its body; then END, or BROKEN if the engine's app failed.
OPEN, BODY, END, GONE, BROKEN = 1, 2, 3, 4, 5
# From the ingress: the caller reads slower than the engine writes; it has caught up.
PAUSE, RESUME = 6, 7

_HEAD = struct.Struct("!IIB")
# Bodies travel in pieces, so that a large one does not hold up the others.
PIECE = 2**16
# Heads are in one frame, which may be so large.
MOST = 2**18
BATCH = 2**18


def new_socket(host: str) -> socket.socket:
    """One that notices within about 30 s that the other machine is gone; those that it accepts do so too."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock


class Link(asyncio.Protocol):
    """One end of a connection. Subclasses hear frames, and that the connection is over."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._out: list[bytes] = []
        self._size = 0
        self._room = asyncio.Event()
        self._room.set()

    @property
    def open(self) -> bool:
        """Whether frames can still be said."""
        return self._transport is not None and not self._transport.is_closing()

    def heard(self, number: int, kind: int, payload: bytes) -> None:
        """A frame has come. Raises ValueError if it makes no sense: the connection is then closed."""
        raise NotImplementedError

    def lost(self) -> None:
        """The connection is over."""
        raise NotImplementedError

    def say(self, number: int, kind: int, payload: bytes = b"") -> None:
        """Send a frame at the end of this turn of the loop; on a connection that is over, nothing."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(_HEAD.pack(len(payload), number, kind) + payload)
        self._size += len(payload)
        if self._size >= BATCH:
            self._flush()

    def say_json(self, number: int, kind: int, value: Any) -> None:
        """The same with JSON. Raises ValueError if it is over MOST bytes: the other end would not take it."""
        payload = json.dumps(value, separators=(",", ":")).encode()
        if len(payload) > MOST:
            raise ValueError(f"the headers are over {MOST >> 10} KiB")
        self.say(number, kind, payload)

    async def say_body(self, number: int, body: bytes) -> None:
        """Send a body's bytes, as fast as the other end takes them."""
        for at in range(0, len(body), PIECE):
            self.say(number, BODY, body[at : at + PIECE])
            if not self._room.is_set():
                await self._room.wait()

    def close(self) -> None:
        """End the connection."""
        if self._transport:
            self._transport.abort()

    def _flush(self) -> None:
        out, self._out, self._size = self._out, [], 0
        if out and self._transport and not self._transport.is_closing():
            self._transport.write(b"".join(out))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        data = self._rest + data
        at, end = 0, len(data)
        while end - at >= _HEAD.size:
            length, number, kind = _HEAD.unpack_from(data, at)
            stop = at + _HEAD.size + length
            if length > MOST:
                self.close()
                return
            if stop > end:
                break
            try:
                self.heard(number, kind, data[at + _HEAD.size : stop])
            except ValueError:
                self.close()
                return
            at = stop
        self._rest = data[at:]

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._room.clear()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._room.set()

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._room.set()
        self.lost()
