"""Wakes and scaling to zero with the real CLI, Ray and vLLM: forks, queueing, capacity and crashes."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from llmrun.wire import START_PARTS
from tests.support.cluster import (
    ENGINE_START_S,
    Home,
    family,
    fork_servers,
    leftovers,
    second_node,
    titled,
    until,
    write_app,
)

# Number of 0→1→0 cycles of two models with random overlap. `just soak-cold-starts` sets 100.
CYCLES = int(os.environ.get("LLMRUN_TEST_CYCLES", "4"))
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600 + 20 * CYCLES)]
# Seconds from the start of a wake until a process is killed. `just soak-cold-starts` runs all three.
DELAYS = [0.0, 0.7, 1.4] if CYCLES > 4 else [0.7]


@pytest.fixture(scope="module")
def tiny(cluster: Home, tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[str]:
    """Deploy two tiny models without starting them; yield the path of their weights."""
    weights = repr(str(tiny_weights))
    app = write_app(
        tmp_path_factory.mktemp("cold") / "cold" / "app.py",
        f"@llm({weights}, cpus=0.2, idle_timeout=2)\nclass One: ...\n\n\n"
        f"@llm({weights}, cpus=0.2, idle_timeout=2)\nclass Two: ...\n",
    )
    cluster.ok("deploy", app, "--lazy")
    yield weights
    cluster.ok("delete", "--app", "cold", "--yes")


def asking(cluster: Home, model: str, **more: Any) -> Future[httpx.Response]:
    """Send a request from a thread; `.result()` returns the response."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(cluster.ask, model, **more)
    pool.shutdown(wait=False)
    return future


def test_a_wake_forks_an_engine_and_reports_its_parts(cluster: Home, tiny: str) -> None:
    def counted(series: str) -> float:
        lines = httpx.get(f"{cluster.url}/metrics").text.splitlines()
        return sum(float(line.removeprefix(series)) for line in lines if line.startswith(series + " "))

    forked = 'llmrun_cold_start_part_seconds_count{model="one",part="forked"}'
    whole = 'llmrun_cold_start_seconds_bucket{le="1800.0",model="one"}'
    until(lambda: fork_servers(cluster), 60, "the fork server starts on its own")
    cluster.unload("one")
    rows, before = len(cluster.starts("one")), (counted(forked), counted(whole))
    assert cluster.ask("one").status_code == 200
    row = until(lambda: len(cluster.starts("one")) > rows and cluster.starts("one"), 10, "the start is recorded")[0]
    assert row["forked"] and tuple(row["parts"]) == START_PARTS
    parts = row["parts"]
    times = [parts[part] for part in START_PARTS if part != "forked"]
    assert times == sorted(times) and times[0] <= 0.2
    assert parts["decided"] <= parts["forked"] <= parts["ready"]
    cluster.wait_for("one", "cold", 30)
    until(lambda: titled(cluster, "ray::IDLE"), 30, "a spare worker is available")
    started = time.monotonic()
    assert cluster.ask("one").status_code == 200
    assert time.monotonic() - started < 8  # 2 s on an idle machine; a start without a fork takes 20 s
    parts = cluster.starts("one")[0]["parts"]
    assert parts["forked"] < parts["placed"]  # the engine was prestarted
    shown = cluster.ok("status", "one")
    assert "FIRST TOKEN" in shown and "median" in shown and "forked" in shown
    assert (counted(forked) - before[0], counted(whole) - before[1]) == (2, 2)


def test_warm_and_unload_commands(cluster: Home, tiny: str, tmp_path: Path) -> None:
    app = write_app(
        tmp_path / "kept" / "app.py", f"@llm({tiny}, engine='stub', cpus=0.2, min_replicas=1)\nclass Kept: ...\n"
    )
    cluster.ok("deploy", app)
    assert "kept is cold" in cluster.ok("unload", "kept")
    time.sleep(1)  # four ticks of the autoscaler
    assert cluster.status("kept")["state"] == "cold"
    assert "kept is hot" in cluster.ok("warm", "kept")
    cluster.ok("unload", "kept")
    assert cluster.ask("kept").status_code == 200
    assert "not found; available:" in cluster.fails("warm", "nobody")
    assert "Deleted kept" in cluster.ok("delete", "kept", "--yes")


def test_a_schedule_keeps_a_model_hot(cluster: Home, tiny: str, tmp_path: Path) -> None:
    options = "engine='stub', cpus=0.2, idle_timeout=1, schedule='00:00-24:00'"
    text = f"@llm({tiny}, {options})\nclass Office: ...\n"
    app = write_app(tmp_path / "office" / "app.py", text)
    cluster.ok("deploy", app, "--lazy")
    cluster.wait_for("office", "hot", 60)
    time.sleep(2.5)  # longer than its idle_timeout
    assert cluster.status("office")["state"] == "hot"
    app.write_text(app.read_text().replace("schedule='00:00-24:00'", "schedule=None"))
    assert "without a restart" in cluster.ok("deploy", app)
    cluster.wait_for("office", "cold", 10)
    cluster.ok("delete", "office", "--yes")


def test_a_streaming_client_gets_keepalives_during_a_long_wake(cluster: Home, tiny: str, tmp_path: Path) -> None:
    text = f"""
import time

@llm({tiny}, cpus=0.2)
class Slow:
    def on_start(self):
        time.sleep(11)
"""
    cluster.ok("deploy", write_app(tmp_path / "slow" / "app.py", text), "--lazy")
    body = {"model": "slow", "prompt": "Hi", "max_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=ENGINE_START_S) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[0] == ": waking slow, 10 s, loading weights" and lines[-1] == "data: [DONE]"
    cluster.ok("delete", "slow", "--yes")


def test_a_disconnect_withdraws_a_wake_that_waits_for_capacity(cluster: Home, tiny: str, tmp_path: Path) -> None:
    cluster.unload()
    cpus = (os.cpu_count() or 2) - 0.1
    options = f"engine='stub', cpus={cpus}"
    text = f"@llm({tiny}, {options}, evictable=False, idle_timeout=60, min_uptime=0)\nclass Holder: ...\n\n\n"
    text += f"@llm({tiny}, {options})\nclass Waiter: ...\n"
    cluster.ok("deploy", write_app(tmp_path / "room" / "app.py", text), "--lazy")
    assert cluster.ask("holder").status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        cluster.ask("waiter", timeout=3)
    status = cluster.wait_for("waiter", "cold", 3)
    assert status["replicas"] == 0 and status["waiting"] == 0
    answer = cluster.ask("waiter", headers={"X-LLMRun-Max-Wait": "2"})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert "timed out after 2 s while waiter was starting (X-LLMRun-Max-Wait): not enough capacity" in answer.text
    assert "it needs" in answer.text and "in use by holder" in answer.text
    # The wake continues for a while, although its client gave up.
    until(lambda: "not enough capacity" in cluster.ok("status", "waiter"), 3, "the model is waking")
    cluster.unload("holder")
    assert cluster.ask("waiter").status_code == 200
    cluster.ok("delete", "--app", "room", "--yes")


def test_two_models_on_one_gpu_evict_each_other(cluster: Home, tiny: str, tmp_path: Path) -> None:
    options = "engine='stub', accelerator='A10G', idle_timeout=300, min_uptime=1"
    text = f"@llm({tiny}, {options})\nclass Left: ...\n\n\n@llm({tiny}, {options})\nclass Right: ...\n"
    app = write_app(tmp_path / "gpu" / "app.py", text)
    with second_node(cluster, tmp_path / "second"):
        until(lambda: cluster.run("deploy", app, "--lazy").returncode == 0, 60, "the node joins the cluster")
        for model, other in (("left", "right"), ("right", "left"), ("left", "right")):
            assert cluster.ask(model).status_code == 200
            cluster.wait_for(model, "hot", 5)
            assert cluster.status(other)["state"] in ("cold", "draining")
        assert f"evicted to free resources for {model}" in cluster.status(other)["cause"]
        cluster.unload()
        both = [asking(cluster, model) for model in ("left", "right")]  # at the same time, on one GPU
        assert [one.result().status_code for one in both] == [200, 200]
        cluster.ok("delete", "--app", "gpu", "--yes")
        until(lambda: not cluster.engines("left") + cluster.engines("right"), 30, "the engines exit")


def test_a_model_that_is_always_asked_makes_room_for_others(cluster: Home, tiny: str, tmp_path: Path) -> None:
    """Turns come after `max_wait_for_room`; batch requests give way at once."""
    options = "engine='stub', accelerator='A10G', idle_timeout=300, min_uptime=1, max_wait_for_room=8"
    text = f"@llm({tiny}, {options})\nclass Busy: ...\n\n\n@llm({tiny}, {options})\nclass Rare: ...\n"
    app = write_app(tmp_path / "turns" / "app.py", text)
    stop = threading.Event()

    def ask_always(**headers: str) -> list[int]:
        codes = []
        while not stop.is_set():
            codes.append(cluster.ask("busy", headers=headers).status_code)
        return codes

    def ask_rare(priority: str) -> float:
        """Ask while others ask the busy model all the time; return the seconds until the answer."""
        assert cluster.ask("busy").status_code == 200
        time.sleep(1.5)  # longer than min_uptime
        stop.clear()
        with ThreadPoolExecutor(3) as pool:
            work = [pool.submit(ask_always, **{"X-LLMRun-Priority": priority}) for _ in range(3)]
            try:
                time.sleep(0.5)
                asked = time.monotonic()
                assert cluster.ask("rare", timeout=60).status_code == 200
                waited = time.monotonic() - asked
                cluster.wait_for("busy", "hot", 30)  # its turn comes again: others still ask for it
            finally:
                stop.set()
        assert {code for one in work for code in one.result()} == {200}
        return waited

    with second_node(cluster, tmp_path / "second"):
        until(lambda: cluster.run("deploy", app, "--lazy").returncode == 0, 60, "the node joins the cluster")
        batch, normal = ask_rare("batch"), ask_rare("normal")
        print(f"waited for room: {batch:.1f} s among batch requests, {normal:.1f} s among normal ones")
        assert batch < 8 <= normal < 25
        cluster.ok("delete", "--app", "turns", "--yes")
        until(lambda: not cluster.engines("busy") + cluster.engines("rare"), 30, "the engines exit")


Victims = Callable[[Home], list[psutil.Process]]


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize(
    ("who", "find"),
    [
        ("the fork server", fork_servers),
        ("the engine", lambda cluster: cluster.engines("one")),
        ("the replica", lambda cluster: titled(cluster, "ray::ServeReplica:llmrun-one")),
        ("the node agent", lambda cluster: titled(cluster, "ray::NodeAgent")),
    ],
)
def test_a_process_killed_during_a_wake_fails_no_request(
    cluster: Home, tiny: str, who: str, find: Victims, delay: float
) -> None:
    cluster.unload("one")
    answer = asking(cluster, "one")
    time.sleep(delay)
    victims = until(lambda: find(cluster) or (answer.done() and "late"), 60, f"{who} is running")
    assert victims != "late"
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert answer.result().status_code == 200, answer.result().text


def test_an_engine_forks_while_another_loads(cluster: Home, tiny: str) -> None:
    cluster.unload()
    until(lambda: fork_servers(cluster), 60, "the fork server is running")
    answers = [asking(cluster, model) for model in ("one", "two", "one")]
    assert [answer.result().status_code for answer in answers] == [200, 200, 200]


def measured(cluster: Home) -> dict[str, tuple[int, float]]:
    """Return the open files and private memory (MiB) of each long-lived cluster process."""
    usage = {}
    for process in family(cluster):
        try:
            name = " ".join(process.cmdline())[:60]
            if not name.startswith(("ray::ServeReplica", "ray::IDLE")):
                memory = process.memory_info()
                usage[f"{process.pid} {name}"] = (process.num_fds(), (memory.rss - memory.shared) / 2**20)
        except psutil.Error:
            continue
    return usage


def test_cycles_leave_nothing_behind(cluster: Home, tiny: str) -> None:
    def cycle_through(model: str, dice: random.Random, stop: threading.Event) -> list[int]:
        codes = []
        while not stop.is_set():
            codes.append(cluster.ask(model, max_tokens=dice.choice([1, 8, 200])).status_code)
            stop.wait(dice.choice([0, 0.5, 2, 2.2, 2.5, 3, 4, 5]))  # before, at and after idle_timeout
        return codes

    def woken() -> int:
        text = httpx.get(f"{cluster.url}/metrics").text
        counts = [line.split()[-1] for line in text.splitlines() if line.startswith("llmrun_cold_start_seconds_count")]
        return int(sum(map(float, counts)))

    log = cluster.path / "logs" / "warm-vllm.log"
    cluster.unload()
    cached = log.read_text().count("has cached")
    assert [cluster.ask(model).status_code for model in ("one", "two")] == [200, 200]
    cluster.unload()
    until(lambda: log.read_text().count("has cached") > cached, 30, "the fork server has filled its cache")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    stop, before_cycles, before, files = threading.Event(), woken(), {}, leftovers()
    with ThreadPoolExecutor(4) as pool:
        work = [
            pool.submit(cycle_through, model, random.Random(seed + n), stop)
            for n, model in enumerate(("one", "two", "one", "two"))
        ]
        try:
            until(lambda: woken() - before_cycles >= min(CYCLES, 10) // 2, 600, "half of the first cycles have run")
            before = measured(cluster)
            until(lambda: woken() - before_cycles >= CYCLES, 60 * CYCLES, "all cycles have run")
        finally:
            stop.set()
    codes = [code for one in work for code in one.result()]
    assert len(codes) >= CYCLES and set(codes) == {200}
    cluster.unload()
    until(lambda: not titled(cluster, "ray::ServeReplica"), 30, "the replicas exit")
    until(lambda: leftovers() <= files, 30, f"no files are left except {files}")
    assert not cluster.engines("one") and not cluster.engines("two")
    until(lambda: titled(cluster, "ray::IDLE"), 30, "a spare worker is available again")
    after = measured(cluster)
    assert len(after) <= len(before) + 1  # a runtime environment helper may start late
    for name, (fds, mib) in after.items():
        if name in before:
            assert fds <= before[name][0] + 12, (name, fds, before[name])
            assert mib <= before[name][1] + 40 + 0.3 * CYCLES, (name, mib, before[name])
