"""Sidecars: what a server never sees, and that it is the right one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import FormData

from llmrun_runtime.engines.base import Launch, Member
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.engines.sidecar.engine import SOCKET, SidecarConfig
from llmrun_runtime.engines.sidecar.requests import problem
from llmrun_runtime.engines.sidecar.server import RequestRefused, Sidecar, listens
from tests.support.cluster import until

LONG = "QUJD" * 2000  # too long for a path


def image(place: Any) -> dict[str, Any]:
    """A chat request with an image."""
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": place}]}]}


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (image({"url": "http://169.254.169.254/latest"}), "not fetched from 169.254.169.254"),
        (image({"url": "https://good.example@evil.example/x"}), "not fetched from evil.example"),
        (image("/etc/passwd"), "from no files"),
        (image({"url": "home/op/scan.png"}), "from no files"),
        (image({"url": "file:///etc/passwd"}), "from no files"),
        (image({"url": "//evil.example/x"}), "from no files"),
        (image({"url": "http://[bad"}), "no URL"),
        (image(["/etc/passwd"]), "from no files"),
        ({"input": [{"content": [{"type": "input_image", "image_url": "http://evil.example"}]}]}, "evil.example"),
        ({"input": [{"content": [{"type": "input_audio", "input_audio": {"data": "etc/passwd"}}]}]}, "from no files"),
        ({"messages": [{"content": [{"type": "video_url", "video_url": {"url": "ftp://a/b"}}]}]}, "from no files"),
        ({"messages": [{"content": [{"type": ["tool_use"], "image_url": "/etc/passwd"}]}]}, "from no files"),
        ({"text": "x", "image_data": ["/etc/passwd"]}, "from no files"),
        ({"messages": [{"content": [{"type": "image", "source": {"type": "url", "url": "http://e/x"}}]}]}, "from e"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "the model's own is used"),
        ({"chat_template": "{{ x }}"}, "the model's own is used"),
    ],
)
def test_media_that_a_server_would_fetch_or_open_are_refused(payload: dict[str, Any], words: str) -> None:
    assert words in problem(payload, ("good.example",))


@pytest.mark.parametrize(
    "payload",
    [
        image({"url": "data:image/png;base64,QUJD", "detail": "high"}),
        image({"url": "https://good.example/x.png"}),
        {"messages": [{"content": [{"type": "input_audio", "input_audio": {"data": LONG, "format": "wav"}}]}]},
        {"messages": [{"role": "user", "content": "see /etc/passwd and http://evil.example"}]},
        {"tools": [{"function": {"parameters": {"properties": {"image_url": {"type": "string"}}}}}]},
        {"messages": [{"content": [{"type": "tool_use", "input": {"path": "/tmp/x"}}]}]},
        {"chat_template_kwargs": {"enable_thinking": False}, "chat_template": None},
        [1],
    ],
)
def test_requests_without_such_media_pass(payload: Any) -> None:
    assert problem(payload, ("good.example",)) == ""


def test_a_deeply_nested_request_is_checked_without_recursion() -> None:
    nested: Any = "/etc/passwd"
    for _ in range(100_000):
        nested = [nested]
    assert "from no files" in problem({"image": nested}, ())


def test_the_media_hosts_of_engine_args_are_the_sidecars_not_the_servers() -> None:
    args: dict[str, Any] = {"allowed_media_domains": ["Good.example"], "dtype": "float32"}
    launch = Launch(("one",), "/w", (Member("n", "127.0.0.1"),), args, sys.executable)
    _, _, _, _, config, *command = get_engine("transformers").command(launch)
    assert SidecarConfig.from_json(config).media_hosts == ("good.example",)
    assert SOCKET in command and "--dtype" in command and not any("media" in word for word in command)


def test_a_form_cannot_choose_the_model_that_the_server_loads() -> None:
    app = Sidecar(SidecarConfig("127.0.0.1", "one", "/weights", "/health", (), ()))
    sent = app._form_with_server_name(FormData([("model", "other/model"), ("language", "de"), ("model", "third")]))
    fields = {field[0]["name"]: field[2] for field in sent._fields}
    assert fields == {"language": "de", "model": "/weights"}
    with pytest.raises(RequestRefused, match=r"'file' has no file"):
        app._form_with_server_name(FormData([("file", "/etc/passwd")]))
    with pytest.raises(RequestRefused, match="from no files"):
        app._with_server_name(json.dumps(image("/etc/passwd")).encode())


def test_a_port_that_another_process_took_is_not_the_servers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server:
            assert not listens(server.pid, port) and listens(os.getpid(), port)
            server.communicate(b"\n")
        assert not listens(server.pid, port)


def test_a_uvicorn_server_listens_on_a_socket_instead_of_its_port(tmp_path: Path) -> None:
    module = tmp_path / "served.py"
    module.write_text(
        "import sys, uvicorn\n"
        "async def app(scope, receive, send): ...\n"
        "def main():\n"
        "    assert sys.argv[1:] == ['serve', 'x'], sys.argv\n"
        "    uvicorn.Server(uvicorn.Config(app, host='127.0.0.1', port=0, lifespan='off')).run()\n"
    )
    path = tmp_path / "server"
    command = [sys.executable, "-m", "llmrun_runtime.engines.sidecar.on_socket", "served:main", str(path), "serve", "x"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as server:
        try:
            until(path.is_socket, 20, "the server listens")
        finally:
            server.terminate()
