"""Processes that hang are found and replaced: the engine's core, its API server, the replica."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.support.cluster import ENGINE_START_S, SMOLLM2, Home, alive, titled, until, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
STALL_S = 4


@pytest.fixture(scope="module")
def model(cluster: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model whose engine may produce nothing for STALL_S."""
    text = f"""
@llm({str(SMOLLM2)!r}, name="hangs", cpus=0.3, stall_timeout={STALL_S}, idle_timeout=600)
class Hangs: ...
"""
    cluster.ok("deploy", write_app(tmp_path_factory.mktemp("hangs") / "app.py", text))
    yield "hangs"
    cluster.ok("delete", "hangs", "--yes")


def family(cluster: Home, model: str) -> list[psutil.Process]:
    """The engine's processes: the API server, then its core."""
    (server,) = cluster.engines(model)
    return [server, *server.children(recursive=True)]


@contextlib.contextmanager
def streaming(cluster: Home, model: str) -> Iterator[Iterator[str]]:
    """Stream a long answer during the block; yield its events from the second on."""
    body = {"model": model, "prompt": "1 2 3 4", "max_tokens": 1900, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=ENGINE_START_S) as answer:
        events = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(events)
        yield events


def test_an_engine_whose_core_hangs_is_replaced(model: str, cluster: Home) -> None:
    cluster.make_hot(model)
    server, core = family(cluster, model)[:2]
    with streaming(cluster, model) as stream:
        core.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        rest = list(stream)
    ended = time.monotonic() - stopped
    assert "error" in json.loads(rest[-1].removeprefix("data: ")), rest[-1]
    assert ended < 2 * STALL_S + 20
    cause = cluster.status(model)["cause"]
    assert "the engine hangs: no output for" in cause and "a probe got none in 4 s" in cause
    until(lambda: not alive(server) and not alive(core), 15, "the engine's processes have ended")
    assert cluster.ask(model).status_code == 200
    print(f"core: cause and end of the stream after {ended:.1f} s, answer after {time.monotonic() - stopped:.1f} s")


def test_an_api_server_that_hangs_is_replaced(model: str, cluster: Home) -> None:
    cluster.make_hot(model)
    server, core = family(cluster, model)[:2]
    server.suspend()
    stopped = time.monotonic()
    until(lambda: "has not responded for 4 s" in cluster.status(model)["cause"], 20, "the status has the cause")
    found = time.monotonic() - stopped
    until(lambda: not alive(server) and not alive(core), 30, "the engine's processes have ended")
    assert cluster.ask(model).status_code == 200
    print(f"API server: found after {found:.1f} s, answer after {time.monotonic() - stopped:.1f} s")


def test_a_replica_that_hangs_is_replaced(model: str, cluster: Home) -> None:
    """Requests wait for the next one as soon as control has no reports."""
    cluster.make_hot(model)
    (replica,) = titled(cluster, f"ray::ServeReplica:llmrun-{model}")
    replica.suspend()
    stopped, slowest = time.monotonic(), 0.0
    while alive(replica):
        asked = time.monotonic()
        answer = cluster.ask(model)
        assert answer.status_code == 200, answer.text
        slowest = max(slowest, time.monotonic() - asked)
        assert time.monotonic() - stopped < 60, "the replica still lives"
        time.sleep(0.2)
    replaced = time.monotonic() - stopped
    assert "its replica did not report for 20 s" in (cluster.path / "logs" / "control.log").read_text()
    until(lambda: len(cluster.engines(model)) == 1, 30, "its engine has ended")
    assert cluster.ask(model).status_code == 200
    print(f"replica: ended after {replaced:.1f} s, slowest answer meanwhile {slowest:.1f} s")


def test_a_long_answer_is_not_taken_for_a_hang(model: str, cluster: Home) -> None:
    cluster.make_hot(model)
    server = family(cluster, model)[0]
    with streaming(cluster, model) as events:
        until(lambda: cluster.status(model)["in_flight"] == 1, 10, "the request is in flight")
        time.sleep(2 * STALL_S)  # this client does not read meanwhile
        assert next(events)
    assert family(cluster, model)[0] == server


def test_a_core_that_is_killed_ends_no_stream_as_if_it_were_whole(model: str, cluster: Home) -> None:
    """vLLM's API server, which lives for a moment longer, ends streams with `[DONE]` and answers 500."""
    cluster.make_hot(model)
    core = family(cluster, model)[1]
    with streaming(cluster, model) as events:
        core.kill()
        answers = [cluster.ask(model) for _ in range(2)]
        rest = list(events)
    assert "stream interrupted" in rest[-1] and not any("[DONE]" in event for event in rest)
    for answer in answers:  # the second one may wait for the new engine
        assert answer.status_code in (200, 503), answer.text
        assert answer.status_code == 200 or answer.headers["retry-after"]
    until(lambda: cluster.ask(model).status_code == 200, 60, "it answers after the pause for repeated failures")
