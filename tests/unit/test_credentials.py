"""Which key the command line sends where: the admin key only to the cluster of its own home."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmrun.errors import ControlError, LLMRunError
from llmrun.identity import CHALLENGE_HEADER, PROOF_HEADER, digest_of, prove
from llmrun.settings import Settings
from llmrun_cli.client import Client
from llmrun_cli.credentials import api_credentials

KEY = "k" * 64


class Server(ThreadingHTTPServer):
    """Answers all requests like control, and keeps the `Authorization` headers that it gets."""

    def __init__(self, digest: str = "", relayed_port: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.digest, self.relayed_port = digest, relayed_port
        self.received: list[str] = []

    @property
    def url(self) -> str:
        """The URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers challenges as `server.digest` says."""

    server: Any

    def do_GET(self) -> None:
        if header := self.headers.get("Authorization"):
            self.server.received.append(header)
        self.send_response(200)
        if (challenge := self.headers.get(CHALLENGE_HEADER)) and self.server.digest:
            port = self.server.relayed_port or self.server.server_address[1]
            self.send_header(PROOF_HEADER, prove(self.server.digest, challenge, port))
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LLMRUN_URL", "LLMRUN_ADMIN_KEY", "LLMRUN_API_KEY", "LLMRUN_INSECURE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMRUN_HOME", str(tmp_path))
    (tmp_path / "admin.key").write_text(KEY)
    return tmp_path


def serve(servers: list[Server], server: Server) -> Server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    servers.append(server)
    return server


def named(home: Path, server: Server) -> Settings:
    """Make `server` the cluster that runs from the home."""
    (home / "cluster.json").write_text(f'{{"url": "{server.url}"}}')
    return Settings()


def test_a_cluster_that_proves_itself_gets_the_key(home: Path, servers: list[Server]) -> None:
    server = serve(servers, Server(digest_of(KEY)))
    client = Client(named(home, server))
    client.keys()
    client.keys()
    assert server.received == [f"Bearer {KEY}"] * 2
    same = Settings(url=server.url.replace("127.0.0.1", "localhost") + "/")
    assert Client(same).keys() == [] and len(server.received) == 3


@pytest.mark.parametrize("digest", ["", "no such digest", digest_of("another key")])
def test_a_stranger_on_the_clusters_port_gets_no_key(home: Path, servers: list[Server], digest: str) -> None:
    server = serve(servers, Server(digest))
    for settings in (named(home, server), Settings(url=server.url)):
        with pytest.raises(ControlError, match=r"is not the cluster of this LLMRUN_HOME.*the admin key was not sent"):
            Client(settings).keys()
    with pytest.raises(ControlError), httpx.Client(auth=api_credentials(Settings())) as http:
        http.get(f"{server.url}/v1/models")
    assert not server.received


def test_a_proof_from_another_port_is_not_accepted(home: Path, servers: list[Server]) -> None:
    server = serve(servers, Server(digest_of(KEY), relayed_port=1))
    with pytest.raises(ControlError, match="the admin key was not sent"):
        Client(named(home, server)).keys()
    assert not server.received


def test_another_cluster_gets_the_key_that_the_environment_names_or_none(home: Path, servers: list[Server]) -> None:
    own, other = serve(servers, Server(digest_of(KEY))), serve(servers, Server(digest_of(KEY)))
    named(home, own)
    Client(Settings(url=other.url)).keys()
    assert not other.received
    Client(Settings(url=other.url, admin_key="theirs")).keys()
    assert other.received == ["Bearer theirs"]


@pytest.mark.parametrize("url", ["http://10.0.0.1:8000", "http://gpu-box"])
def test_no_key_travels_unencrypted(home: Path, url: str) -> None:
    for settings in (Settings(url=url, admin_key="k"), Settings(url=url, api_key="k")):
        with pytest.raises(ControlError, match=r"it would travel unencrypted\. Use https://, or a tunnel"):
            api_credentials(settings)
        assert api_credentials(settings.model_copy(update={"insecure": True}))
        assert api_credentials(settings.model_copy(update={"url": url.replace("http:", "https:")}))
    assert not api_credentials(Settings(url=url)), "the home's key is for its own cluster"


def test_a_server_that_does_not_answer_the_challenge_is_not_waited_for(
    home: Path, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrun_cli.credentials.PROOF_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = Settings(url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        (home / "cluster.json").write_text(f'{{"url": "{settings.url}"}}')
        with pytest.raises(LLMRunError, match="cannot reach llmrun"):
            Client(settings).keys()
