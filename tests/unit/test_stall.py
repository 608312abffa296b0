"""An engine that responds but produces nothing is recognized, and all its processes end."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from llmrun.errors import EngineError
from llmrun_runtime.asgi import Message, send_json
from llmrun_runtime.engines.base import SHIM_ENV, TOKEN_ENV, Member, ShimConfig
from llmrun_runtime.engines.process import engine_process
from llmrun_runtime.engines.process.engine_process import EngineProcess
from llmrun_runtime.engines.shim import usage_meter
from llmrun_runtime.engines.shim.middleware import Shim
from llmrun_runtime.engines.sidecar.sglang import SGLang
from llmrun_runtime.engines.sidecar.transformers import Transformers
from llmrun_runtime.engines.vllm.engine import VLLM
from llmrun_runtime.replica import deployment
from llmrun_runtime.replica.deployment import Replica
from llmrun_runtime.replica.stall import StallWatch, probe_request
from llmrun_runtime.replica.unreported_counts import UnreportedCounts
from llmrun_runtime.wire.headers import PROBE_PREFIX, STATE_PATH, TOKEN_HEADER
from tests.support.cluster import until
from tests.support.factories import spec
from tests.support.stub_engine import COMPLETIONS, Stub
from tests.unit.test_engines import Script, alive, launch, pids

COMPLETION = {"prompt": "1", "max_tokens": 1}


class Probe:
    """Counts probes; each ends when the test says how."""

    def __init__(self) -> None:
        self.limits: list[float] = []
        self.answer = asyncio.get_running_loop().create_future()

    async def __call__(self, limit: float) -> bool:
        self.limits.append(limit)
        self.answer = asyncio.get_running_loop().create_future()
        answered: bool = await self.answer
        return answered

    async def end(self, answer: bool | Exception) -> None:
        """End the probe in progress, and let its task run."""
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)
        await asyncio.sleep(0)


def stalled(seconds: float, in_flight: int = 3) -> dict[str, Any]:
    """Return an engine's state."""
    return {"stalled_s": seconds, "in_flight": in_flight}


async def test_an_engine_hangs_if_neither_requests_nor_a_probe_get_any_output() -> None:
    probe = Probe()
    watch = StallWatch(120, probe)
    assert watch.check(stalled(119.9), 1000) == "" and not probe.limits
    assert watch.check(stalled(120), 1000.5) == "" == watch.check(stalled(150), 1030)
    await probe.end(answer=False)
    cause = watch.check(stalled(180.4), 1060.5)
    assert cause == "the engine hangs: no output for 180 s with 3 requests in flight, and a probe got none in 60 s"
    assert probe.limits == [60]


async def test_output_of_any_request_ends_a_probe() -> None:
    probe = Probe()
    watch = StallWatch(10, probe)
    assert watch.check(stalled(11), 100) == ""
    await asyncio.sleep(0)
    assert watch.check(stalled(0.3), 100.5) == ""
    await asyncio.sleep(0)
    assert probe.answer.cancelled()
    assert watch.check(stalled(9.9), 110) == "" and probe.limits == [10]


async def test_a_probe_that_is_answered_resets_the_clock() -> None:
    """A custom engine may report no output, and a client that does not read keeps a request in flight."""
    probe = Probe()
    watch = StallWatch(10, probe)
    watch.check(stalled(11), 100)
    await probe.end(answer=True)
    assert [watch.check(stalled(s), 89 + s) for s in (12, 15, 21.9)] == [""] * 3 and len(probe.limits) == 1
    assert watch.check(stalled(22.1), 111.1) == ""
    await asyncio.sleep(0)
    assert len(probe.limits) == 2


async def test_an_engine_that_cannot_be_reached_does_not_hang() -> None:
    probe = Probe()
    watch = StallWatch(10, probe)
    watch.check(stalled(11), 100)
    await probe.end(EngineError("the engine does not answer"))
    assert watch.check(stalled(12), 101) == ""


async def test_without_a_stall_timeout_nothing_is_probed() -> None:
    probe = Probe()
    assert StallWatch(0, probe).check(stalled(10**6), 10**6) == ""
    await asyncio.sleep(0)
    assert not probe.limits


def test_the_probe_fits_the_engine_and_the_task() -> None:
    assert probe_request(VLLM.probe_paths, "auto", "one") == (
        "/v1/completions",
        {"model": "one", "prompt": "1", "max_tokens": 1, "temperature": 0},
    )
    assert probe_request({"/v1/embeddings"}, "auto", "one")[0] == "/v1/embeddings"
    assert probe_request(SGLang.probe_paths, "embed", "one")[0] == "/v1/embeddings"
    assert probe_request(VLLM.probe_paths, "score", "one")[0] == "/v1/score"
    assert probe_request(Transformers.probe_paths, "generate", "one") == ("/health", None), "it serves one at a time"


async def call(shim: Shim, path: str) -> Any:
    """Call the shim; return the JSON of its response."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(TOKEN_HEADER.encode(), b"t")], "app": None}
    await shim(scope, None, send)  # type: ignore[arg-type]
    return json.loads(messages[1]["body"])


async def test_the_state_reports_how_long_requests_got_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "t")
    monkeypatch.setenv(SHIM_ENV, ShimConfig(model="m").to_json())
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2)
        seen.append(await call(shim, STATE_PATH))
        usage_meter.mark_output()
        seen.append(await call(shim, STATE_PATH))
        await send_json(send, 200, {})

    shim = Shim(app)
    usage_meter.mark_output()
    await asyncio.sleep(0.2)
    assert (await call(shim, STATE_PATH))["stalled_s"] == 0, "nothing is in flight"
    await call(shim, COMPLETIONS)
    assert 0.2 <= seen[0]["stalled_s"] < 0.35 and seen[1]["stalled_s"] < 0.1


async def test_a_probe_is_counted_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "t")
    config = ShimConfig(model="m", file="/nowhere.py", cls="M", hooks=("on_request",))
    monkeypatch.setenv(SHIM_ENV, config.to_json())
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["path"], usage_meter.current(), await call(shim, STATE_PATH)))
        await send_json(send, 200, {})

    shim = Shim(app)
    before = await call(shim, STATE_PATH)
    await call(shim, PROBE_PREFIX + COMPLETIONS)
    path, request, during = seen[0]
    assert (path, request, during["in_flight"]) == (COMPLETIONS, None, 0)
    after = await call(shim, STATE_PATH)
    assert after["served"] == before["served"] and after["idle_s"] >= before["idle_s"], "it does not keep a model warm"


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[EngineProcess]:
    """A stub engine that is ready."""
    (tmp_path / "weights").mkdir()
    member = Member("n", "127.0.0.1")
    env = dict(os.environ)
    options: dict[str, Any] = {
        "weights": str(tmp_path / "weights"),
        "members": (member,),
        "env": env,
        "names": ("one",),
    }
    engine = EngineProcess(Stub(), launch(log=tmp_path / "log", **options))
    await engine.start()
    await engine.ready(20)
    yield engine
    await engine.end()


Post = Callable[..., Awaitable[int]]


@pytest.fixture
async def post(stub: EngineProcess) -> AsyncIterator[Post]:
    """Send a request to the stub engine, as the ingress does; return its status."""
    async with aiohttp.ClientSession(headers={TOKEN_HEADER: stub.token}) as session:

        async def send(**body: Any) -> int:
            async with session.post(f"http://127.0.0.1:{stub.port}{COMPLETIONS}", json=body) as answer:
                await answer.read()
                return answer.status

        yield send


async def test_a_frozen_engine_fails_its_replica(
    stub: EngineProcess, post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(deployment, "get_engine", lambda name: Stub())
    replica: Any = SimpleNamespace(_config=SimpleNamespace(spec=spec(stall_timeout=0.4)))
    replica._engine, replica._remote_members, replica._unreported = stub, None, UnreportedCounts()
    replica._write_line, replica._counted_at = lines.append, 0.0
    replica._read_counts = functools.partial(Replica._read_counts, replica)
    replica._stall = StallWatch(0.4, functools.partial(Replica._probe, replica))
    slow = asyncio.ensure_future(post(freeze=True))
    causes: list[str] = []
    async with asyncio.timeout(10):
        while not any(causes):
            causes.append(await Replica._check_engine(replica))
            await asyncio.sleep(0.05)
    slow.cancel()
    assert causes[-1].endswith("with 1 requests in flight, and a probe got none in 0.4 s")
    assert lines == ["no output for 0 s: probing the engine at /v1/completions"]
    assert await stub.probe("/v1/completions", COMPLETION, 0.2) == 0


async def test_a_slow_engine_that_answers_a_probe_stays(stub: EngineProcess, post: Post, tmp_path: Path) -> None:
    statuses: list[int] = []

    async def probe(limit: float) -> bool:
        statuses.append(await stub.probe("/v1/completions", COMPLETION, limit))
        return statuses[-1] > 0

    watch = StallWatch(0.3, probe)
    held = asyncio.ensure_future(post(hold=str(tmp_path / "held")))
    loop = asyncio.get_running_loop()
    ends = loop.time() + 1.5
    while loop.time() < ends:
        assert watch.check(await stub.state(), loop.time()) == ""
        await asyncio.sleep(0.05)
    held.cancel()
    assert len(statuses) >= 2 and set(statuses) == {200}
    assert (await stub.state())["usage"] == []


FAMILY = """
import os, signal, time
from llmrun_runtime.engines.api import hold
signal.signal(signal.SIGTERM, signal.SIG_IGN)
hold()
os.fork()
print("pid", os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stopped", ["none", "first", "second", "both"])
async def test_processes_that_are_stopped_or_ignore_sigterm_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    monkeypatch.setattr(engine_process, "TERM_GRACE_S", 0.5)
    monkeypatch.setattr(engine_process, "GROUP_GRACE_S", 0.5)
    engine = EngineProcess(Script(FAMILY), launch(log=tmp_path / "log"))
    await engine.start()
    family = await asyncio.to_thread(pids, tmp_path / "log", 2)
    for pid in family:
        if stopped in ("both", "first" if pid == engine.pid else "second"):
            os.kill(pid, signal.SIGSTOP)
    await engine.end()
    await asyncio.to_thread(until, lambda: not any(map(alive, family)), 2, "both have exited")


LONG = """
from llmrun_runtime.engines.api import hold, notify
import time
hold()
notify(failed=chr(0x1f999) * 10**6)
time.sleep(600)
"""


async def test_a_failure_of_any_length_is_reported(tmp_path: Path) -> None:
    engine = EngineProcess(Script(LONG), launch(log=tmp_path / "log"))
    await engine.start()
    with pytest.raises(EngineError) as failed:
        await engine.ready(20)
    await engine.end()
    assert set(str(failed.value)) == {chr(0x1F999)} and len(str(failed.value)) == 8000
