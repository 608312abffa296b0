"""Hooks, redeploys and crashes of one app with three tiny models, on real vLLM on CPU."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.cluster import (
    ENGINE_START_S,
    REPO,
    Home,
    alive,
    second_node,
    until,
    write_app,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
EXAMPLE = REPO / "examples/smollm2/app.py"
# The answer must win by a wide margin: CPUs with and without AMX round differently, which can flip a 135M model.
PARIS = "Name the capital of France."


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for `requirements` that defines one word."""
    path = tmp_path_factory.mktemp("wheel") / "llmrun_word-1.0-py3-none-any.whl"
    info = "llmrun_word-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("llmrun_word.py", "WORD = 'from the wheel'\n")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llmrun-word\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def first_app(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, wheel: Path) -> tuple[Path, str]:
    """An app file and its text. Its tiny models: with hooks and a secret, the same with a requirement, and plain."""
    path = tmp_path_factory.mktemp("apps") / "tools" / "app.py"
    (path.parent).mkdir()
    (path.parent / "helper.py").write_text("def shout(text):\n    return text.upper()\n")
    write_app(
        path,
        f"""
import os
import time

ENV = {{"WORD": Secret("WORD_FOR_TESTS"), "PLAIN": "plain"}}

@llm({str(tiny_weights)!r}, cpus=0.3, idle_timeout=3, env=ENV)
class Hooked:
    def on_start(self):
        self.word, self.starts = "no wheel", 1

    def on_request(self, request):
        from helper import shout
        content = request.get("messages", [{{"content": ""}}])[-1]["content"]
        if content == "tell":
            raise ValueError(f"{{self.word}}, {{os.environ['WORD']}}, {{shout(os.environ['PLAIN'])}}, {{self.starts}}")
        if content == "none":
            return None
        request["max_tokens"] = 3 if content == "short" else request["max_tokens"]
        return request

@llm({str(tiny_weights)!r}, cpus=0.2, idle_timeout=3, requirements=[{str(wheel)!r}], env=ENV)
class Wheeled(Hooked):
    def on_start(self):
        import llmrun_word
        self.word, self.starts = llmrun_word.WORD, 1

@llm({str(tiny_weights)!r}, cpus=0.3, idle_timeout=300)
class Plain: ...
""",
    )
    return path, path.read_text()


@pytest.fixture
def hooked_app(first_app: tuple[Path, str]) -> Path:
    """The app file, restored to its original text."""
    path, text = first_app
    path.write_text(text)
    return path


@pytest.fixture
def deployed(cluster: Home, hooked_app: Path, module_state: dict[str, Any]) -> dict[str, Any]:
    """Deploy the original app unless it is deployed; return the status of `plain`. Tests may change file and models."""
    versions = {row["name"]: row["version"] for row in cluster.models() if row["app"] == "tools"}
    if not versions or versions != module_state.get("versions"):
        cluster.ok("deploy", hooked_app, "--lazy", "--prune")
        module_state["versions"] = {row["name"]: row["version"] for row in cluster.models() if row["app"] == "tools"}
    return cluster.status("plain")


@pytest.fixture(scope="module")
def module_state() -> dict[str, Any]:
    """State that `deployed` keeps between tests."""
    return {}


@pytest.fixture
def plain(cluster: Home, deployed: dict[str, Any]) -> dict[str, Any]:
    """Make `plain` hot and return its status."""
    cluster.make_hot("plain")
    until(lambda: len(cluster.status("plain")["details"]) == 1, 60, "the replica of the previous version has stopped")
    until(lambda: len(family_of_title(cluster, "ray::ServeReplica:llmrun-plain")) == 1, 30, "its process has exited")
    return cluster.status("plain")


@pytest.fixture(scope="module", autouse=True)
def cleanup(cluster: Home) -> Iterator[None]:
    """Delete the app after the last test."""
    yield
    if cluster.find("hooked"):
        cluster.ok("delete", "--app", "tools", "--yes")


def test_hooks_run_next_to_the_engine(cluster: Home, hooked_app: Path) -> None:
    if cluster.find("hooked"):
        cluster.ok("delete", "--app", "tools", "--yes")
    output = cluster.ok("deploy", hooked_app, "--lazy")
    assert "+ hooked" in output and "not started (--lazy)" in output
    assert cluster.status("plain")["state"] == "cold" and not cluster.status("hooked")["proven"]

    refused = cluster.ask("wheeled", "tell")
    assert refused.status_code == 500
    assert (
        refused.json()["error"]["message"] == "Wheeled.on_request raised ValueError: from the wheel, sesame, PLAIN, 1"
    )
    assert cluster.ask("hooked", "none").json()["error"]["code"] == "hook_failed"
    short = cluster.ask("hooked", "short", max_tokens=50).json()
    assert short["usage"]["completion_tokens"] == 3
    assert cluster.status("hooked")["proven"]
    log = cluster.ok("logs", "wheeled")
    assert "ValueError: from the wheel" in log and "app.py" in log and "engine ready after" in log


def test_idle_models_scale_to_zero_after_streams_end_and_wake_again(cluster: Home, deployed: dict[str, Any]) -> None:
    body = {
        "model": "hooked",
        "prompt": "Once upon a time",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=ENGINE_START_S) as stream:
        (engine,) = until(lambda: cluster.engines("hooked"), 60, "the engine runs")
        (replica,) = cluster.wait_for("hooked", "hot", ENGINE_START_S)["details"]
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]" and time.monotonic() - started > 3
    assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 2000

    host, port = replica["address"].split(":")
    family = [engine, *engine.children(recursive=True)]
    status = cluster.wait_for("hooked", "cold", 30)
    assert status["replicas"] == 0 and status["details"] == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
        pass

    answers: list[httpx.Response] = []
    callers = [threading.Thread(target=lambda: answers.append(cluster.ask("hooked"))) for _ in range(3)]
    for caller in callers:
        caller.start()
    cluster.wait_for("hooked", "waking", 10)
    for caller in callers:
        caller.join()
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert "no wheel, sesame, PLAIN, 1" in cluster.ask("hooked", "tell").text


def test_a_failed_redeploy_keeps_the_previous_version_active(
    cluster: Home, hooked_app: Path, plain: dict[str, Any]
) -> None:
    (engine,) = cluster.engines("plain")
    text = hooked_app.read_text()
    try:
        hooked_app.write_text(
            text.replace("cpus=0.3, idle_timeout=300", 'cpus=0.3, engine_args="--max-model-len 99999"')
        )
        error = cluster.fails("deploy", f"{hooked_app}::Plain")
        assert "max_model_len (99999) is greater than the derived max_model_len" in error
        assert f"version {plain['version']} stays active" in error and "Traceback" not in error
        hooked_app.write_text(text.replace("cpus=0.3, idle_timeout=300", 'cpus=0.3, engine_args="--no-such-flag 1"'))
        assert "unrecognized arguments: --no-such-flag" in cluster.fails("deploy", f"{hooked_app}::Plain")
    finally:
        hooked_app.write_text(text)
    assert [p.pid for p in cluster.engines("plain")] == [engine.pid]
    assert cluster.ask("plain").status_code == 200 and cluster.status("plain")["version"] == plain["version"]


def test_a_redeploy_of_two_replicas_loses_no_request_and_no_capacity(
    cluster: Home, tmp_path: Path, tiny_weights: Path
) -> None:
    text = f"@llm({str(tiny_weights)!r}, cpus=0.2, min_replicas=2, max_replicas=2)\nclass Pair: ...\n"
    app = write_app(tmp_path / "pair" / "app.py", text)
    cluster.ok("deploy", app)
    until(lambda: cluster.status("pair")["replicas"] == 2, 60, "both replicas are ready")
    before, version = cluster.engines("pair"), cluster.status("pair")["version"]
    stop, ends, ready = threading.Event(), list[str](), list[int]()
    body = {"model": "pair", "prompt": "Once", "max_tokens": 30, "ignore_eos": True, "stream": True}

    def keep_streaming() -> None:
        while not stop.is_set():
            with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=ENGINE_START_S) as stream:
                ends.append([line for line in stream.iter_lines() if line][-1])

    def keep_looking() -> None:
        while not stop.wait(0.1):
            ready.append(cluster.status("pair")["replicas"])

    threads = [threading.Thread(target=work) for work in (keep_looking, *[keep_streaming] * 10)]
    for thread in threads:
        thread.start()
    try:
        app.write_text(app.read_text().replace("cpus=0.2,", 'cpus=0.2, engine_args="--max-model-len 1024",'))
        output = cluster.ok("deploy", app)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert "~ pair  (new engine" in output and "engine_args {} → {max_model_len: 1024}" in output
    assert len(ends) > 20 and set(ends) == {"data: [DONE]"}
    assert len(ready) > 10 and min(ready) >= 2
    until(lambda: not any(map(alive, before)), 30, "the previous version has drained")
    assert cluster.status("pair")["version"] == version + 1
    cluster.ok("delete", "pair", "--yes")


def test_killed_processes_are_restarted(cluster: Home, plain: dict[str, Any]) -> None:
    (engine,) = cluster.engines("plain")
    family: list[psutil.Process] = [engine, *engine.children(recursive=True)]
    find_actor(cluster, "ray::ServeReplica:llmrun-plain").kill()
    until(lambda: not any(alive(process) for process in family), 10, "the engine has exited with its replica")
    assert cluster.ask("plain").status_code == 200

    (engine,) = cluster.engines("plain")
    (core,) = [child for child in engine.children() if "EngineCore" in " ".join(child.cmdline())]
    core.kill()
    until(lambda: not alive(engine), 30, "the engine has exited with its core")
    until(lambda: "the engine died" in cluster.status("plain")["cause"], 10, "the status shows the cause")
    assert cluster.ask("plain").status_code == 200
    assert cluster.status("plain")["cause"] == ""

    for actor in ("ray::Control", "ray::IngressActor"):
        find_actor(cluster, actor).kill()
        until(lambda: healthy(cluster), 30, f"the endpoint works again after {actor} was killed")
        assert cluster.ask("plain").status_code == 200
        assert cluster.wait_for("plain", "hot")["version"] == plain["version"]


def family_of(pid: int, title: str) -> list[psutil.Process]:
    """Return the live descendants of `pid` whose titles contain `title`."""
    return [p for p in psutil.Process(pid).children(recursive=True) if alive(p) and title in " ".join(p.cmdline())]


def family_of_title(cluster: Home, title: str) -> list[psutil.Process]:
    """Return the processes of this cluster's actors whose titles start with `title`."""
    parent = psutil.Process(json.loads((cluster.path / "cluster.json").read_text())["pid"])
    return [process for process in family_of(parent.pid, title) if " ".join(process.cmdline()).startswith(title)]


def find_actor(cluster: Home, title: str) -> psutil.Process:
    """Return the process of this cluster's only actor with the title."""
    (actor,) = family_of_title(cluster, title)
    return actor


def healthy(cluster: Home) -> bool:
    """Whether the ingress and control respond."""
    with contextlib.suppress(httpx.HTTPError):
        return bool(cluster.models())
    return False


def test_models_removed_from_the_file_stay_until_pruned(
    cluster: Home, hooked_app: Path, deployed: dict[str, Any]
) -> None:
    text = hooked_app.read_text()
    hooked_app.write_text(text[: text.rindex("@llm(")])
    code, shown = cluster.run_on_a_terminal("deploy", hooked_app, answers="n\nn\n")
    assert code == 1 and "Delete plain, no longer in the file? [y/N]" in shown and "Deploy? [Y/n]" in shown
    output = cluster.ok("deploy", hooked_app, "--no-wait", "--lazy")
    assert "- plain" in output and "Kept, though no longer in the file: plain" in output
    assert cluster.ask("plain").status_code == 200
    hooked_app.write_text(hooked_app.read_text() + "\n# another package\n")
    assert "removed" in cluster.ok("deploy", hooked_app, "--lazy", "--prune")
    assert cluster.ask("plain").json()["error"]["code"] == "model_not_found"
    assert "no wheel" in cluster.ask("hooked", "tell").text


def test_a_model_runs_on_the_second_node(cluster: Home, tmp_path: Path, hooked_app: Path) -> None:
    second = tmp_path / "second"
    with second_node(cluster, second) as node:
        text = hooked_app.read_text()
        away = tmp_path / "away" / "app.py"
        away.parent.mkdir()
        (away.parent / "helper.py").write_text((hooked_app.parent / "helper.py").read_text())
        away.write_text(text.replace("class Wheeled", "class Away").replace("cpus=0.2,", 'accelerator="A10G",'))
        until(
            lambda: "cluster has" not in cluster.run("deploy", f"{away}::Away", "--dry-run").stderr,
            60,
            "the node has joined",
        )
        output = cluster.ok("deploy", f"{away}::Away")
        assert "+ away" in output and "on 1 × A10G" in output
        assert "second" in cluster.ask("away", "tell").text
        assert list((second / "packages").iterdir()) and not list((second / "packages").glob(".new-*"))
        assert cluster.engines("away")
        assert len(list((second / "logs" / "models" / "away").iterdir())) == 1
        assert "engine ready after" in cluster.ok("logs", "away")
        cluster.wait_for("away", "cold", 30)
        assert not cluster.engines("away")
        assert "Deleted away" in cluster.ok("delete", "--app", "away", "--yes")
        until(lambda: not family_of(node.pid, "ServeReplica"), 30, "the replica and its engine have exited")
