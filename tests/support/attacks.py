"""What strangers send to a cluster's ports, and what another account of its machine tries. Without a credential."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

NOBODY = 65534
TIMEOUT_S = 5.0
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CHAT = b'{"model":"target","messages":[{"role":"user","content":"hi"}]}'
# Beginnings that the parsers behind the ports know, so that random bytes get further than their first check.
BEGINNINGS = (
    b"",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: ",
    b"POST /llmrun/v1/deploys HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
    HTTP2 + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b'{"pid": 1, "proof": "',  # a lease
    struct.pack("!IIB", 40, 1, 1) + b'{"method":"POST","path":"/","query":"',  # a link
    struct.pack("!IIB", 2**18, 1, 2),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"\x80\x04\x95",  # a pickle
)


@dataclass(frozen=True)
class Listener:
    """A TCP socket on which a process listens."""

    host: str
    port: int
    pid: int
    title: str


def listeners(processes: list[psutil.Process]) -> list[Listener]:
    """Return the TCP sockets on which they listen."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())[:100].strip()
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    host = each.laddr.ip.removeprefix("::ffff:")
                    found.append(Listener(host, each.laddr.port, process.pid, title))
    return found


def send(address: tuple[str, int], data: bytes, timeout: float = TIMEOUT_S) -> bytes:
    """Send bytes, then nothing more; return what comes back until the other end closes, or for `timeout` seconds."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(address, TIMEOUT_S) as connection:
        connection.settimeout(timeout)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while len(answer) < 2**20 and (piece := connection.recv(2**16)):
            answer += piece
    return answer


def fuzz(addresses: list[tuple[str, int]], seed: int, rounds: int) -> None:
    """Send random bytes after each of BEGINNINGS to each address, `rounds` times."""
    chance = random.Random(seed)
    with ThreadPoolExecutor(16) as pool:
        for beginning in BEGINNINGS * rounds:
            cut = beginning[: chance.randrange(len(beginning) + 1)] if chance.random() < 0.2 else beginning
            data = cut + chance.randbytes(chance.choice((1, 9, 100, 5000)))
            list(pool.map(partial(send, data=data, timeout=0.3), addresses))


# What the ingress tells everybody, as `/health` does.
PUBLIC = '{"name": "llmrun", "version": '


def refusals(listener: Listener) -> dict[str, str]:
    """Return the successes of a stranger at a socket, by what was asked. There should be none."""
    successes = {}
    url = f"http://{listener.host}:{listener.port}"
    for method, path in (
        *(("GET", path) for path in ("/", "/v1/models", "/metrics", "/llmrun/v1/status", "/state", "/api/version")),
        *(("POST", path) for path in ("/v1/completions", "/v1/load_lora_adapter", "/llmrun/v1/deploys", "/sleep")),
    ):
        try:
            answer = httpx.request(method, url + path, content=CHAT if method == "POST" else None, timeout=3)
        except httpx.HTTPError:
            return {}  # it does not speak HTTP
        if answer.status_code < 400 and not (path == "/" and answer.text.startswith(PUBLIC)):
            successes[f"{method} {path}"] = answer.text[:200]
    return successes


POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
# Requests that are to be refused, or answered as one well-formed request, with what an answer may begin with.
RAW: dict[str, tuple[bytes, tuple[bytes, ...]]] = {
    "two lengths": (
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        (b"400",),
    ),
    "length and chunks": (
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x",
        (b"400",),
    ),
    "chunks, obscured": (
        POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        (b"400",),
    ),
    "a bare CR in a value": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-A: b\rX-B: c\r\n\r\n", (b"400",)),
    "a bare LF": (b"GET /v1/models HTTP/1.1\nHost: a\n\n", (b"400",)),
    "a NUL in a name": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX\0A: b\r\n\r\n", (b"400",)),
    "a header of 1 MiB": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 2**20 + b"\r\n\r\n", (b"431",)),
    "10,000 headers": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 10_000 + b"\r\n", (b"431",)),
    "HTTP/0.9": (b"GET /v1/models\r\n", (b"400", b"")),
    "HTTP/9.9": (b"GET /v1/models HTTP/9.9\r\nHost: a\r\n\r\n", (b"400",)),
    "a chunk of a negative size": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        (b"400", b"401"),
    ),
    "no request": (b"\0" * 4096, (b"400",)),
    "CONNECT": (b"CONNECT 10.0.0.1:22 HTTP/1.1\r\nHost: 10.0.0.1:22\r\n\r\n", (b"4",)),
    "another host's URL": (b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", (b"4",)),
    "an upgrade": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", (b"4",)),
}


@contextlib.contextmanager
def slow_connections(address: tuple[str, int], count: int) -> Iterator[list[socket.socket]]:
    """Hold connections that send a byte of a header now and then, in the caller's turns: see `drip`."""
    connections = []
    try:
        for _ in range(count):
            connection = socket.create_connection(address, TIMEOUT_S)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nX-A: ")
            connections.append(connection)
        yield connections
    finally:
        for connection in connections:
            connection.close()


def drip(connections: list[socket.socket]) -> None:
    """Send one more byte on each."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send(b"a")


def as_another_account(work: Callable[[], Any]) -> Any:
    """Run a function in a child process that has become the account `nobody`; return its result, as JSON.

    Raises AssertionError with its text if it raised.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            reply = {"result": work()}
        except BaseException as error:  # noqa: BLE001 - its parent raises it
            reply = {"error": repr(error)}
        with os.fdopen(writer, "w") as file:
            json.dump(reply, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    reply = json.loads(text)
    assert "error" not in reply, reply["error"]
    return reply["result"]


def intrusions(pids: list[int], files: list[str], sockets: list[str]) -> list[str]:
    """Return what this account could do to these processes, files and Unix sockets of another one."""
    done = []
    for path in files:
        for flag, verb in ((os.O_RDONLY, "read"), (os.O_WRONLY, "write")):
            with contextlib.suppress(OSError):
                os.close(os.open(path, flag | os.O_NOFOLLOW))
                done.append(f"{verb} {path}")
    for path in sockets:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(path if not path.startswith("@") else "\0" + path[1:])
            done.append(f"connect {path}")
    for pid in pids:
        for name in ("environ", "mem", "maps", "cwd/"):
            with contextlib.suppress(OSError):
                os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
                done.append(f"read /proc/{pid}/{name}")
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            done.append(f"signal {pid}")
    return done


def unix_sockets(processes: list[psutil.Process]) -> list[str]:
    """Return the Unix sockets of these processes that have a name."""
    names = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            names |= {str(each.laddr) for each in process.net_connections("unix") if each.laddr}
    return sorted(names)


def open_paths(folder: Path) -> list[str]:
    """Return the files below a folder."""
    return [str(path) for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]


def pace(work: Callable[[], Any], interval_s: float, until: float) -> list[float]:
    """Call `work` every `interval_s` seconds until then (monotonic); return how long each call took."""
    took = []
    while (now := time.monotonic()) < until:
        work()
        took.append(time.monotonic() - now)
        time.sleep(max(0.0, interval_s - took[-1]))
    return took
