"""The shim's hooks: they run for every JSON object, whatever the client says about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import UploadFile
from starlette.requests import Request

from llmrun.errors import HookError
from llmrun_runtime.asgi import Message, send_json
from llmrun_runtime.engines.base import SHIM_ENV, TOKEN_ENV, ShimConfig
from llmrun_runtime.engines.shim.forms import Form
from llmrun_runtime.engines.shim.middleware import Shim
from llmrun_runtime.wire.headers import KEY_HEADER, TOKEN_HEADER
from tests.support.ingress import CHAT

HOOK = """
class Guarded:
    def on_request(self, request, context):
        guard = [context.path, context.key, context.adapter, context.form]
        return {**request, "guard": guard}
"""
JSON = (b"content-type", b"application/json")
TEXT = (b"content-type", b"text/plain")
FORM = (b"content-type", b"multipart/form-data; boundary=x")
BODY = b'{"model": "m"}'
GUARDED = {"model": "m", "guard": [CHAT, "alice", "", False]}


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

    async def ask(self, shim: Shim, pieces: list[bytes], *headers: tuple[bytes, bytes]) -> int:
        """Send a body in pieces through the shim; return the status."""
        self.body, self.pieces, self._total = b"", list(pieces), len(pieces)

        async def receive() -> Message:
            return {"type": "http.request", "body": self.pieces.pop(0), "more_body": bool(self.pieces)}

        statuses = []

        async def send(message: Message) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        sent = [(TOKEN_HEADER.encode(), b"t"), (KEY_HEADER.encode(), b"alice"), *headers]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": sent}
        await shim(scope, receive, send)
        return int(statuses[0])


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
    assert await engine.ask(shim, [BODY[:5], BODY[5:]], *headers) == 200
    assert json.loads(engine.body) == GUARDED
    assert dict(engine.headers)[b"content-length"] == str(len(engine.body)).encode()


@pytest.mark.parametrize("body", [b"", b"[1]", b"model=m&x=1", b"\xff\x00", b"-1"])
async def test_other_bodies_pass_the_hooks_unchanged(shim: Shim, engine: Recorder, body: bytes) -> None:
    assert await engine.ask(shim, [body], TEXT) == 200
    assert engine.body == body


async def test_the_fields_of_a_form_pass_the_hooks_and_its_files_stay(shim: Shim, engine: Recorder) -> None:
    sound = b"\r\n--y\r\n\x00\xff" * 1000
    pieces = [
        b"-",
        b'-x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\xc3\xa9\r\n',
        b'--x\r\nContent-Disposition: form-data; name="granularity[]"\r\n\r\nword\r\n',
        b'--x\r\nContent-Disposition: form-data; name="granularity[]"\r\n\r\nsegment\r\n',
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n',
        sound + b"\r\n--x--\r\n",
    ]
    assert await engine.ask(shim, pieces, FORM) == 200
    headers = dict(engine.headers)
    assert headers[b"content-length"] == str(len(engine.body)).encode()
    request = Request({"type": "http", "headers": engine.headers}, _once(engine.body))
    async with request.form() as form:
        assert form.getlist("granularity[]") == ["word", "segment"] and form["model"] == "mé"
        assert form.getlist("guard") == [CHAT, "alice", "", "true"]
        file = form["file"]
        assert isinstance(file, UploadFile)
        assert (file.filename, file.content_type, await file.read()) == ("a.wav", "audio/wav", sound)


def _once(body: bytes) -> Any:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


@pytest.mark.parametrize(
    "body",
    [b"no form", b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n\xff\r\n--x--\r\n", b"--x\r\nbad\r\n\r\n"],
)
async def test_a_form_that_hooks_cannot_read_is_refused(shim: Shim, engine: Recorder, body: bytes) -> None:
    assert await engine.ask(shim, [body], FORM) == 400
    assert not engine.body


def test_other_content_types_are_no_forms() -> None:
    assert Form.parse(b"multipart/form-data", b"--x--") is None
    assert Form.parse(b"text/plain; boundary=x", b"--x--\r\n") is None


def test_fields_are_texts() -> None:
    form = Form({}, [])
    content_type, body = form.encode({'a"\r\n': 1, "b": [True, None, "x"], "c": 0.5})
    again = Form.parse(content_type, body)
    assert again and again.fields == {"a%22%0D%0A": "1", "b": ["true", "x"], "c": "0.5"}
    with pytest.raises(HookError, match="on_request returned dict for the field 'd' of a form"):
        form.encode({"d": {}})


async def test_a_piece_of_a_body_does_not_copy_the_pieces_before_it(shim: Shim, engine: Recorder) -> None:
    assert await engine.ask(shim, [Piece(b"{"), Piece(b'"model": '), Piece(b'"m"}')], JSON) == 200
    assert json.loads(engine.body) == GUARDED
