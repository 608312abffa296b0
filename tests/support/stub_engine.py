"""An example of a third-party engine that starts in a second: its answers contain where its members run.

`python -m tests.support.stub_engine` is one member. Members other than member 0 connect to member 0 and report to it,
as those of real engines do. A request with `"hold": PATH` gets a stream that lasts until its client disconnects; until
then the file PATH contains member 0's process id. After a request with `"freeze": true` it responds, but answers no
request any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llmrun_runtime.engines.api import EngineError, Launch, ModelSpec, Shim, hold, notify, usage_meter

REPO = Path(__file__).parent.parent.parent
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONNECT_TIMEOUT_S = 30


def install(folder: Path) -> dict[str, str]:
    """Install this engine as a package would; return the variable that makes it visible."""
    info = folder / "llmrun_stub-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmrun-stub\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llmrun.engines]\nstub = tests.support.stub_engine:Stub\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(REPO)])}


def stubs() -> list[psutil.Process]:
    """The running members of all engines."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "tests.support.stub_engine" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


class Stub:
    """See `llmrun_runtime.engines.api.Engine`."""

    name = "stub"
    paths = frozenset({CHAT, COMPLETIONS})
    probe_paths = frozenset({COMPLETIONS})
    module = ""

    def refuses(self, spec: ModelSpec) -> str:
        """Accept every model."""
        return ""

    def warning(self, launch: Launch, paths: Collection[str]) -> str:
        """Warn of nothing."""
        return ""

    def command(self, launch: Launch) -> list[str]:
        """Return the command line of one member."""
        return [launch.python, "-m", "tests.support.stub_engine", *self.arguments(launch)]

    def arguments(self, launch: Launch) -> list[str]:
        """Return the member's configuration as JSON."""
        hosts = [member.host for member in launch.members]
        config: dict[str, Any] = {
            "name": launch.names[0],
            "hosts": hosts,
            "rank": launch.member_rank,
            "port": launch.port,
            "share": launch.gpu_share,
        }
        return [json.dumps({**config, "weights": launch.weights})]

    def libraries(self) -> tuple[str, ...]:
        """Preload nothing."""
        return ()

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        """Override nothing."""
        return {}

    def loader(self, app: Any, max_lora_rank: int) -> NoReturn:
        """Support no adapters."""
        raise EngineError("no adapters")

    def has_ended(self, app: Any) -> bool:
        """Never: its server is the engine."""
        return False

    def root_cause(self, log: str) -> str:
        """Return the last line, if it is an exception."""
        lines = log.strip().splitlines()
        return lines[-1] if lines and "Error" in lines[-1] else ""


def place(config: dict[str, Any]) -> dict[str, Any]:
    """Describe where this member runs."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {
        "rank": config["rank"],
        "host": config["hosts"][config["rank"]],
        "devices": [device for device in devices if device],
        "share": config["share"],
        "home": os.environ.get("STUB_HOME", ""),
        "pid": os.getpid(),
        "files": sorted(path.name for path in Path(config["weights"]).iterdir()),
    }


async def stream_until_disconnect(file: Path, receive: Receive, send: Send) -> None:
    """Stream events until the client disconnects."""
    file.write_text(str(os.getpid()))
    disconnected = asyncio.ensure_future(receive())
    try:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not disconnected.done():
            await send({"type": "http.response.body", "body": b'data: {"held": true}\n\n', "more_body": True})
            await asyncio.sleep(0.05)
    finally:
        file.unlink()
        disconnected.cancel()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a chat completion or a completion in OpenAI's shape, with one word per requested token."""
    tokens = int(request.get("max_tokens") or 1)
    text = " ".join(["stub"] * tokens)
    return {
        "id": "stub-1",
        "object": "chat.completion" if "messages" in request else "text_completion",
        "model": request.get("model", ""),
        "choices": [
            {"index": 0, "finish_reason": "length", "text": text, "message": {"role": "assistant", "content": text}}
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1},
    }


async def serve(config: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Answer requests with the places of all members."""
    frozen = asyncio.Event()
    places = [place(config), *sorted(others, key=lambda other: int(other["rank"]))]

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
            if request.get("freeze"):
                frozen.set()
            if frozen.is_set():
                while (await receive())["type"] != "http.disconnect":
                    pass
            elif "hold" in request:
                await stream_until_disconnect(Path(request["hold"]), receive, send)
            else:
                content = answer(request)
                if metered := usage_meter.current():
                    metered.record(prompt=1, completion=content["usage"]["completion_tokens"])
                await JSONResponse({**content, "places": places})(scope, receive, send)

    with socket.create_server((config["hosts"][0], 0)) as sock:
        notify(port=sock.getsockname()[1])
        await uvicorn.Server(uvicorn.Config(Shim(app), ws="none", lifespan="on")).serve(sockets=[sock])


def connect(address: tuple[str, int]) -> socket.socket:
    """Connect to member 0, which may not listen yet. Raises OSError after CONNECT_TIMEOUT_S."""
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            return socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main() -> None:
    """Run one member."""
    hold()
    config = json.loads(sys.argv[1])
    address = (config["hosts"][0], config["port"])
    if config["rank"]:
        with connect(address) as first:
            first.settimeout(None)
            first.sendall(json.dumps(place(config)).encode() + b"\n")
            first.recv(1)  # until member 0 exits
        return
    others, connections = list[dict[str, Any]](), list[socket.socket]()
    if len(config["hosts"]) > 1:
        with socket.create_server(address) as listener:
            listener.settimeout(CONNECT_TIMEOUT_S)
            while len(connections) < len(config["hosts"]) - 1:
                connections.append(listener.accept()[0])
                others.append(json.loads(connections[-1].makefile().readline()))
    asyncio.run(serve(config, others))


if __name__ == "__main__":
    main()
