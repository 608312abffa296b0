"""What another node may say about weights: it can save a download, and change nothing else."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmrun.settings import Settings
from llmrun_runtime.weights.cache.cache import Manifest, ManifestEntry
from llmrun_runtime.weights.fetch import Fetcher, Peer
from llmrun_runtime.weights.node_weights import NodeWeights
from llmrun_runtime.weights.pin import Pin
from tests.support.servers import AWS, Proxy
from tests.support.weights import MIB, Node, make_model, on_s3, read_files

SUMS = ("sha256", "md5")


class OtherNode:
    """A node that sends `files`, with checksums as it likes."""

    def __init__(self, url: str) -> None:
        self.peer = Peer(url=url, token="t")
        self.manifest = ""
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.sent: list[str] = []

    def claims(self, pin: Pin, **digests: str) -> None:
        """Have its manifest say that the files are the pin's, with their real checksums updated by `digests`."""
        entries = {
            name: ManifestEntry(size=len(data), mtime_ns=1, digests=sums(data) | digests, place="x")
            for name, data in self.files.items()
        }
        self.manifest = Manifest(pin=pin, made=time.time(), entries=entries, boot="").model_dump_json()

    def answer(self, path: str) -> bytes:
        """Return the body for a path."""
        _, _, name = path.removeprefix("/").partition("/")
        self.sent.append(name)
        return self.files[name] if name else self.manifest.encode()


def sums(data: bytes) -> dict[str, str]:
    """Return the checksums of bytes."""
    return {name: hashlib.new(name, data, usedforsecurity=False).hexdigest() for name in SUMS}


@pytest.fixture
def other() -> Iterator[OtherNode]:
    """Another node."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = node.answer(self.path)
            start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = body[int(start) : int(end or len(body)) + 1]
            self.send_response(206 if end else 200)
            if end:
                self.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
            for name, value in node.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        node = OtherNode(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield node
        server.shutdown()
        thread.join()


@pytest.fixture
def pin(node: Node, buckets: Path, proxy: Proxy, other: OtherNode, monkeypatch: pytest.MonkeyPatch) -> Pin:
    """A pin of a model on S3, which has the MD5 of each file; the other node has other bytes of the same sizes."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    make_model(buckets / "acme" / "model", (MIB,))
    pin = node.pin(on_s3(proxy))
    assert all(set(file.digests) == {"md5"} for file in pin.files)
    other.files = {file.name: b"x" * file.size for file in pin.files}
    proxy.sent = 0
    return pin


def without_sums(pin: Pin) -> Pin:
    """Return the pin of a store that has no checksums."""
    return pin.model_copy(update={"files": tuple(file.model_copy(update={"digests": {}}) for file in pin.files)})


def fetched(node: Node, pin: Pin, other: OtherNode) -> tuple[dict[str, bytes], Manifest]:
    """Fetch the pin with that peer; return the files and the manifest."""
    manifest = Fetcher(node.cache, pin, peers=[other.peer]).run()
    return read_files(node.cache.folder(pin.id)), manifest


@pytest.mark.parametrize("kept", [SUMS, ("md5",), ("sha256",)], ids=" ".join)
def test_the_pins_checksums_win_over_another_nodes(
    node: Node, buckets: Path, pin: Pin, other: OtherNode, kept: tuple[str, ...]
) -> None:
    real = read_files(buckets / "acme" / "model")
    other.claims(pin)
    manifest = Manifest.model_validate_json(other.manifest)
    for entry in manifest.entries.values():
        entry.digests = {name: entry.digests[name] for name in kept}
    other.manifest = manifest.model_dump_json()
    files, stored = fetched(node, pin, other)
    assert files == real
    assert ("config.json" in other.sent) is ("md5" not in kept), "it is not asked for files that differ, as it says"
    assert {name: entry.digests for name, entry in stored.entries.items()} == {
        file.name: file.digests for file in pin.files
    }


def test_another_node_cannot_switch_off_the_pins_checksums(
    node: Node, buckets: Path, pin: Pin, other: OtherNode
) -> None:
    other.headers = {"x-amz-server-side-encryption": "aws:kms"}
    other.claims(pin)
    assert fetched(node, pin, other)[0] == read_files(buckets / "acme" / "model")


def test_the_manifest_of_another_pin_does_not_count(node: Node, buckets: Path, pin: Pin, other: OtherNode) -> None:
    mine = without_sums(pin)
    other.claims(pin)
    assert fetched(node, mine, other)[0] == read_files(buckets / "acme" / "model")
    assert other.sent == [""], "it was asked for the manifest alone"
    other.claims(mine)
    assert mine.id != pin.id


def test_another_nodes_checksums_do_not_make_the_stores_copy_damaged(
    node: Node, buckets: Path, pin: Pin, other: OtherNode
) -> None:
    pin = without_sums(pin)
    other.claims(pin, sha256="0" * 64)
    assert fetched(node, pin, other)[0] == read_files(buckets / "acme" / "model")


def test_a_checksum_that_was_not_computed_here_is_not_stored(
    node: Node, buckets: Path, pin: Pin, other: OtherNode, proxy: Proxy
) -> None:
    """Otherwise another pin with that checksum would get these bytes from the cache."""
    real = read_files(buckets / "acme" / "model")
    other.files = {file.name: real[file.name] for file in pin.files}
    pin = without_sums(pin)
    other.claims(pin, md5="0" * 32)
    files, manifest = fetched(node, pin, other)
    assert files == real and not proxy.sent, "all came from the other node"
    for name, entry in manifest.entries.items():
        assert entry.digests == {"sha256": sums(real[name])["sha256"]}


def test_files_whose_etag_is_no_md5_come_from_the_store(
    node: Node, buckets: Path, pin: Pin, other: OtherNode, proxy: Proxy
) -> None:
    real = read_files(buckets / "acme" / "model")
    other.files = {file.name: real[file.name] for file in pin.files}
    encrypted = [file.model_copy(update={"digests": {"md5": "0" * 32}}) for file in pin.files]
    pin = pin.model_copy(update={"files": tuple(encrypted)})
    other.claims(pin)
    proxy.fault.headers = {"x-amz-server-side-encryption": "aws:kms"}
    assert fetched(node, pin, other)[0] == real
    assert not set(other.sent) & real.keys(), "its copies would be refused"


async def test_a_token_that_is_not_ascii_is_refused(tmp_path: Path) -> None:
    weights = NodeWeights(Settings(home=tmp_path), "127.0.0.1")
    peer = await weights.serve_peers()
    async with httpx.AsyncClient() as http:
        for token in ("gu\u00e9ss".encode(), b"\xff", "\ud800".encode("utf-8", "surrogatepass")):
            response = await http.get(f"{peer.url}/pin", headers=[(b"authorization", b"Bearer " + token)])
            assert response.status_code == 401
    await weights.close()
