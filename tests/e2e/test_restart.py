"""Stopping, upgrading and crashing a cluster: `down` drains, `restart` loses no request, a killed raylet comes back."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.cluster import BIN, ENGINE_START_S, Home, family, free_port, titled, until, write_app
from tests.support.stub_engine import install

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
CALLERS = 8


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[Home]:
    """A cluster of its own with a tiny model that is hot."""
    home = Home(tmp_path_factory.mktemp("restart"), free_port(), install(tmp_path_factory.mktemp("packages")))
    home.ok("up")
    try:
        text = f"@llm({str(tiny_weights)!r}, cpus=0.5, idle_timeout=600)\nclass Upgraded: ...\n"
        home.ok("deploy", write_app(home.path / "app" / "app.py", text))
        yield home
    finally:
        home.ok("down", "--now")


def stream(home: Home, client: httpx.Client, tokens: int) -> str:
    """Stream an answer; return its last line."""
    body = {"model": "upgraded", "prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with client.stream("POST", f"{home.url}/v1/completions", json=body, timeout=ENGINE_START_S) as answer:
        return f"{answer.status_code} {[line for line in answer.iter_lines() if line][-1]}"


def test_a_restart_fails_no_request_and_ends_no_engine(running: Home) -> None:
    stop, results = threading.Event(), Counter[str]()
    (engine,) = running.engines("upgraded")

    def keep_calling(streams: bool) -> None:
        with httpx.Client() as client:  # it keeps its connection between requests
            while not stop.is_set():
                body = {"model": "upgraded", "prompt": "Once", "max_tokens": 2}
                if streams:
                    results[stream(running, client, 20)] += 1
                else:
                    answer = client.post(f"{running.url}/v1/completions", json=body, timeout=ENGINE_START_S)
                    results[str(answer.status_code)] += 1

    callers = [threading.Thread(target=keep_calling, args=(number % 2 == 0,)) for number in range(CALLERS)]
    for caller in callers:
        caller.start()
    try:
        before = {process.pid for process in titled(running, "ray::IngressActor")}
        assert "llmrun is running" in running.ok("restart", LLMRUN_MAX_BODY_BYTES="1000")
        time.sleep(1)
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert set(results) == {"200", "200 data: [DONE]"} and results.total() > 50, results
    assert before.isdisjoint({process.pid for process in titled(running, "ray::IngressActor")} - before)
    assert running.engines("upgraded") == [engine]
    assert running.ask("upgraded", "word " * 500).status_code == 413  # the new setting
    until(lambda: len(titled(running, "ray::IngressActor")) == 1, 20, "the replaced ingress has exited")


def test_a_killed_raylet_brings_the_cluster_back_with_the_cause_in_its_log(running: Home) -> None:
    (raylet,) = [process for process in family(running) if process.name() == "raylet"]
    raylet.kill()
    until(lambda: not raylet.is_running(), 10, "the raylet has exited")

    # The ingress may still answer for a moment: the parent of the cluster has yet to notice.
    until(lambda: any(p.name() == "raylet" and p.pid != raylet.pid for p in family(running)), 60, "a new raylet runs")

    def answers() -> bool:
        try:
            return running.ask("upgraded").status_code == 200
        except httpx.TransportError:
            return False

    until(answers, 60, "the model answers again")
    log = (running.path / "logs" / "cluster.log").read_text()
    assert "the cluster stopped: a process of Ray exited: raylet [exit code=-9]. Starting it again" in log


def test_down_lets_streams_end_and_refuses_new_requests(running: Home) -> None:
    assert httpx.get(f"{running.url}/ready").status_code == 200
    ends = list[str]()

    def streaming() -> None:
        with httpx.Client() as client:
            ends.append(stream(running, client, 1900))

    caller = threading.Thread(target=streaming)
    caller.start()
    until(lambda: running.status("upgraded")["in_flight"] == 1, 30, "the stream runs")
    stopping = subprocess.Popen([BIN / "llmrun", "down"], env=running.env, stdout=subprocess.PIPE, text=True)
    until(lambda: httpx.get(f"{running.url}/ready").status_code == 503, 10, "the ingress drains")
    refused = running.ask("upgraded")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) > 0 and refused.headers["connection"] == "close"
    caller.join()
    assert ends == ["200 data: [DONE]"]
    assert "Cluster stopped" in stopping.communicate(timeout=60)[0]
    running.ok("up")


def test_a_second_signal_stops_at_once(running: Home) -> None:
    parent = family(running)[0]
    broken = list[type[BaseException]]()

    def streaming() -> None:
        with httpx.Client() as client:
            try:
                stream(running, client, 1900)
            except httpx.TransportError as error:
                broken.append(type(error))

    caller = threading.Thread(target=streaming)
    caller.start()
    until(lambda: running.find("upgraded") and running.status("upgraded")["in_flight"] == 1, 30, "the stream runs")
    parent.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{running.url}/ready").status_code == 503, 10, "the ingress drains")
    parent.send_signal(signal.SIGTERM)
    psutil.wait_procs([parent], 20)
    assert not parent.is_running()
    caller.join()
    assert broken
