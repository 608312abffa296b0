"""The shim's hooks: they run for every JSON object, whatever the client says about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrun_runtime.asgi import Message, send_json
from llmrun_runtime.engines.base import SHIM_ENV, TOKEN_ENV, ShimConfig
from llmrun_runtime.engines.shim.middleware import Shim
from llmrun_runtime.wire.headers import TOKEN_HEADER

HOOK = """
class Guarded:
    def on_request(self, request):
        return {**request, "guard": True}
"""
JSON = (b"content-type", b"application/json")
TEXT = (b"content-type", b"text/plain")
FORM = (b"content-type", b"multipart/form-data; boundary=x")
BODY = b'{"model": "m"}'
GUARDED = {"model": "m", "guard": True}


class Piece(bytes):
    """A part of a body that cannot be appended to immutable bytes: that is quadratic in the number of parts."""

    def __radd__(self, before: bytes | bytearray) -> Any:
        assert isinstance(before, bytearray), "the shim copies the parts before this one"
        return NotImplemented  # it then appends in place


class Recorder:
    """An engine's app behind the shim: reads each body, and how many messages the shim had read before."""

    def __init__(self) -> None:
        self.body = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.read_before = 0
        self.pieces: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers, self.read_before, more = scope["headers"], self._read(), True
        while more:
            message = await receive()
            self.body += message["body"]
            more = message["more_body"]
        await send_json(send, 200, {})

    def _read(self) -> int:
        return self._total - len(self.pieces)

    async def ask(self, shim: Shim, pieces: list[bytes], *headers: tuple[bytes, bytes]) -> None:
        """Send a body in pieces through the shim."""
        self.body, self.pieces, self._total = b"", list(pieces), len(pieces)

        async def receive() -> Message:
            return {"type": "http.request", "body": self.pieces.pop(0), "more_body": bool(self.pieces)}

        async def send(message: Message) -> None:
            assert message.get("status", 200) == 200

        sent = [(TOKEN_HEADER.encode(), b"t"), *headers]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": sent}
        await shim(scope, receive, send)


@pytest.fixture
def engine() -> Recorder:
    """An engine's app."""
    return Recorder()


@pytest.fixture
async def shim(engine: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shim:
    """A shim in front of the app, with a hook that marks each request."""
    (tmp_path / "app.py").write_text(HOOK)
    monkeypatch.setenv(TOKEN_ENV, "t")
    config = ShimConfig(model="m", file=str(tmp_path / "app.py"), cls="Guarded", hooks=("on_request",))
    monkeypatch.setenv(SHIM_ENV, config.to_json())
    shim = Shim(engine)
    assert shim._hooks
    await shim._hooks.start()
    return shim


@pytest.mark.parametrize("headers", [(JSON,), (TEXT,), (), (FORM,), (JSON, TEXT), (TEXT, JSON)])
async def test_hooks_run_whatever_the_content_type(
    shim: Shim, engine: Recorder, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    await engine.ask(shim, [BODY[:5], BODY[5:]], *headers)
    assert json.loads(engine.body) == GUARDED
    assert dict(engine.headers)[b"content-length"] == str(len(engine.body)).encode()


@pytest.mark.parametrize("body", [b"", b"[1]", b"model=m&x=1", b"\xff\x00", b"-1"])
async def test_other_bodies_pass_the_hooks_unchanged(shim: Shim, engine: Recorder, body: bytes) -> None:
    await engine.ask(shim, [body], TEXT)
    assert engine.body == body


async def test_a_form_passes_the_hooks_in_pieces(shim: Shim, engine: Recorder) -> None:
    pieces = [b"-", b"-x\r\nContent-Disposition: form-data; name=model\r\n\r\nm", b"\r\n--x--\r\n", b""]
    await engine.ask(shim, pieces, FORM)
    assert engine.body == b"".join(pieces)
    assert engine.read_before == 2, "the rest is not held"


async def test_a_piece_of_a_body_does_not_copy_the_pieces_before_it(shim: Shim, engine: Recorder) -> None:
    await engine.ask(shim, [Piece(b"{"), Piece(b'"model": '), Piece(b'"m"}')], JSON)
    assert json.loads(engine.body) == GUARDED
