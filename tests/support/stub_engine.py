"""An engine that makes no text: it answers where its members are and with which devices. `python -m` is one member.

Members of rank 1 and more say so to the first one, at the port where they meet, as real engines do. A request with
`"hold": PATH` gets a stream that goes on until its caller leaves; a file with the
member's number is there as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil
import uvicorn

from llmrun.errors import EngineError
from llmrun.spec import ModelSpec
from llmrun_runtime import asgi
from llmrun_runtime.asgi import Receive, Scope, Send
from llmrun_runtime.engines.base import Launch
from llmrun_runtime.engines.shim import lease
from llmrun_runtime.engines.shim.middleware import Shim

REPO = Path(__file__).parent.parent.parent
CHAT = "/v1/chat/completions"
MEET_S = 30


def install(folder: Path) -> dict[str, str]:
    """Have this engine as an installed package would bring it; the variables that make it known."""
    info = folder / "llmrun_stub-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmrun-stub\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llmrun.engines]\nstub = tests.support.stub_engine:Stub\n")
    # Warm parents would be vLLM's.
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(REPO)]), "LLMRUN_FORKSERVER": "0"}


def stubs() -> list[psutil.Process]:
    """The members of all engines that live."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "tests.support.stub_engine" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Stub:
    """See `llmrun_runtime.engines.base.Engine`."""

    name = "stub"
    paths = frozenset({CHAT})
    module = ""

    def refuses(self, spec: ModelSpec) -> str:
        """It takes all."""
        return ""

    def command(self, launch: Launch) -> list[str]:
        """One member."""
        return [launch.python, "-m", "tests.support.stub_engine", *self.arguments(launch)]

    def arguments(self, launch: Launch) -> list[str]:
        """What it must know of the others."""
        hosts = [member.host for member in launch.members]
        said = {"hosts": hosts, "rank": launch.rank, "port": launch.port, "share": launch.gpu_share}
        return [json.dumps({**said, "weights": launch.weights})]

    def libraries(self) -> tuple[str, ...]:
        """None."""
        return ()

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        """Nothing of its own."""
        return {}

    def loader(self, app: Any, max_rank: int) -> NoReturn:
        """It takes no adapters."""
        raise EngineError("no adapters")

    def root_cause(self, log: str) -> str:
        """Its last line, if that is an exception."""
        lines = log.strip().splitlines()
        return lines[-1] if lines and "Error" in lines[-1] else ""


def place(said: dict[str, Any]) -> dict[str, Any]:
    """Where this member is."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {
        "rank": said["rank"],
        "host": said["hosts"][said["rank"]],
        "devices": [device for device in devices if device],
        "share": said["share"],
        "home": os.environ.get("STUB_HOME", ""),
        "pid": os.getpid(),
        "files": sorted(path.name for path in Path(said["weights"]).iterdir()),
    }


async def hold(place: Path, receive: Receive, send: Send) -> None:
    """Stream events until the caller leaves."""
    place.write_text(str(os.getpid()))
    left = asyncio.ensure_future(receive())
    try:
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        while not left.done():
            await send({"type": "http.response.body", "body": b'data: {"held": true}\n\n', "more_body": True})
            await asyncio.sleep(0.05)
    finally:
        place.unlink()
        left.cancel()


async def serve(said: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Answer where all members are."""
    places = [place(said), *sorted(others, key=lambda other: int(other["rank"]))]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            request = json.loads(body)
            if "hold" in request:
                await hold(Path(request["hold"]), receive, send)
            else:
                await asgi.answer(send, 200, {"places": places})

    with socket.create_server((said["hosts"][0], 0)) as sock:
        lease.tell(port=sock.getsockname()[1])
        await uvicorn.Server(uvicorn.Config(Shim(app), ws="none", lifespan="on")).serve(sockets=[sock])


def meet(where: tuple[str, int]) -> socket.socket:
    """A connection to the first member, which may not listen yet. Raises OSError after MEET_S."""
    deadline = time.monotonic() + MEET_S
    while True:
        try:
            return socket.create_connection(where, timeout=MEET_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main() -> None:
    """One member."""
    lease.hold()
    said = json.loads(sys.argv[1])
    where = (said["hosts"][0], said["port"])
    if said["rank"]:
        with meet(where) as first:
            first.settimeout(None)
            first.sendall(json.dumps(place(said)).encode() + b"\n")
            first.recv(1)  # until it ends
        return
    others, kept = list[dict[str, Any]](), list[socket.socket]()
    if len(said["hosts"]) > 1:
        with socket.create_server(where) as meeting:
            meeting.settimeout(MEET_S)
            while len(kept) < len(said["hosts"]) - 1:
                kept.append(meeting.accept()[0])
                others.append(json.loads(kept[-1].makefile().readline()))
    asyncio.run(serve(said, others))


if __name__ == "__main__":
    main()
