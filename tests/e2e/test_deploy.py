"""The main job, through the real command line, a real Ray and real vLLM on CPU. The tests go on from one another."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.support.cluster import (
    BIN,
    ENGINE_START_S,
    REPO,
    SMOLLM2,
    Home,
    alive,
    free_port,
    second_node,
    until,
    write_app,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
EXAMPLE = REPO / "examples/smollm2/app.py"
# By a wide margin: kernels of different CPUs round differently (AMX or not), and a 135M model is easily turned.
PARIS = "Name the capital of France."


@pytest.fixture(scope="module")
def openai(cluster: Home) -> Iterator[OpenAI]:
    """OpenAI's own client."""
    with OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=ENGINE_START_S, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for `requirements`, with one word in it."""
    path = tmp_path_factory.mktemp("wheel") / "llmrun_word-1.0-py3-none-any.whl"
    info = "llmrun_word-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("llmrun_word.py", "WORD = 'from the wheel'\n")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llmrun-word\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def hooked_app(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, wheel: Path) -> Path:
    """An app of three tiny models: with hooks, a helper module and a secret, with a requirement beside, and plain."""
    path = tmp_path_factory.mktemp("apps") / "tools" / "app.py"
    (path.parent).mkdir()
    (path.parent / "helper.py").write_text("def shout(text):\n    return text.upper()\n")
    return write_app(
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
        said = request.get("messages", [{{"content": ""}}])[-1]["content"]
        if said == "tell":
            raise ValueError(f"{{self.word}}, {{os.environ['WORD']}}, {{shout(os.environ['PLAIN'])}}, {{self.starts}}")
        if said == "none":
            return None
        request["max_tokens"] = 3 if said == "short" else request["max_tokens"]
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


def deploy_example(cluster: Home) -> str:
    """Deploy the demo's app; what the command said."""
    return cluster.ok("deploy", EXAMPLE)


def test_the_example_answers_any_openai_client(cluster: Home, openai: OpenAI) -> None:
    assert "imported" in cluster.ok("weights", "import", SMOLLM2, "--as", "HuggingFaceTB/SmolLM2-135M-Instruct")
    said = deploy_example(cluster)
    assert "+ smollm2" in said and f"{cluster.url}/v1" in said and "curl " in said

    messages: Any = [{"role": "user", "content": PARIS}]
    answer = openai.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=20)
    assert "Paris" in str(answer.choices[0].message.content)
    stream = openai.chat.completions.create(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", messages=messages, temperature=0, max_tokens=20, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 3 and "Paris" in "".join(pieces)
    completion = openai.completions.create(model="smollm2", prompt="Paris is the capital of", max_tokens=4)
    assert completion.choices[0].text
    assert [model.id for model in openai.models.list()] == ["smollm2"]
    assert openai.models.retrieve("HuggingFaceTB/SmolLM2-135M-Instruct").object == "model"


def test_a_second_deploy_changes_nothing_and_is_quick(cluster: Home) -> None:
    (engine,) = cluster.engines("smollm2")
    begun = time.monotonic()
    said = deploy_example(cluster)
    assert time.monotonic() - begun < 3
    assert "nothing has changed" in said
    assert [p.pid for p in cluster.engines("smollm2")] == [engine.pid]


def test_numbers_change_without_a_restart(cluster: Home, tmp_path: Path) -> None:
    (engine,) = cluster.engines("smollm2")
    text = EXAMPLE.read_text()
    other = tmp_path / "smollm2" / "app.py"
    other.parent.mkdir()
    other.write_text(text.replace("aliases=", "max_replicas=2, idle_timeout=600, aliases="))
    assert "last deployed from" in cluster.fails("deploy", other)
    said = cluster.ok("deploy", other, "--adopt")
    assert "~ smollm2  (no restart)" in said and "max_replicas 1 → 2" in said and "idle_timeout 300 → 600" in said
    assert [p.pid for p in cluster.engines("smollm2")] == [engine.pid]
    assert cluster.status("smollm2")["version"] == 2
    assert "max_replicas 2 → 1" in cluster.ok("deploy", EXAMPLE, "--adopt")


def test_an_idle_cluster_takes_less_than_2_gib_beside_its_engines_and_their_warm_parent(cluster: Home) -> None:
    parent = psutil.Process(json.loads((cluster.path / "cluster.json").read_text())["pid"])
    engines = {p.pid for engine in cluster.engines("smollm2") for p in (engine, *engine.children(recursive=True))}
    family = [process for process in (parent, *parent.children(recursive=True)) if process.pid not in engines]
    warm = [process for process in family if "llmrun: warm parent" in " ".join(process.cmdline())]
    assert [process.memory_info().rss < 2**30 for process in warm] == [True]
    rest = sum(process.memory_info().rss for process in family) - warm[0].memory_info().rss
    assert len(family) > 8 and rest < 2 * 2**30


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("org/model", 'accelerator="H100"', ["one: accelerator='H100': no node can give 1 × H100", "The cluster has"]),
        ("org/model", "cpus=500", ["cpus=500", "no node can give 500 CPUs"]),
        ("s3://acme/model", "", ["s3://acme/model: access denied", "set AWS_ACCESS_KEY_ID", "on node 127.0.0.2"]),
        ("org/model", "", ["org/model: ", "cannot be asked", "llmrun weights import DIR --as org/model"]),
        ("./nowhere", "", ["nowhere'", "no such path"]),
        ("org/model", 'engine="tgi"', ["engine='tgi'", "there are sglang, transformers, vllm"]),
        ("org/model", 'aliases=["smollm2"]', ["'smollm2' belongs to model smollm2 of app smollm2"]),
    ],
)
def test_what_can_be_known_to_fail_is_refused_at_deploy(
    cluster: Home, tmp_path: Path, model: str, arguments: str, words: list[str]
) -> None:
    said = cluster.fails("deploy", write_app(tmp_path / "bad.py", f"@llm({model!r}, {arguments})\nclass One: ...\n"))
    for word in words:
        assert word in said


def test_hooks_run_beside_the_engine(cluster: Home, hooked_app: Path) -> None:
    said = cluster.ok("deploy", hooked_app, "--lazy")
    assert "+ hooked" in said and "not started (--lazy)" in said
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


def test_only_the_ingress_reaches_an_engine(cluster: Home) -> None:
    address = cluster.wait_for("smollm2", "hot")["details"][0]["address"]
    for path in ("/v1/models", "/health", "/metrics", "/_llmrun/state"):
        assert httpx.get(f"http://{address}{path}").status_code == 401
    assert httpx.post(f"{cluster.url}/metrics", json={"model": "smollm2"}).status_code == 405  # control's own
    for path in ("/v1/load_lora_adapter", "/v1/embeddings", "/_llmrun/state", "/reset_prefix_cache"):
        assert httpx.post(f"{cluster.url}{path}", json={"model": "smollm2"}).status_code == 404


def test_idle_models_go_to_zero_streams_are_not_cut_and_the_next_request_wakes_them(cluster: Home) -> None:
    body = {
        "model": "hooked",
        "prompt": "Once upon a time",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun = time.monotonic()
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=ENGINE_START_S) as stream:
        (engine,) = until(lambda: cluster.engines("hooked"), 60, "the engine runs")
        (replica,) = cluster.wait_for("hooked", "hot", ENGINE_START_S)["details"]
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]" and time.monotonic() - begun > 3
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


def test_a_failed_redeploy_leaves_the_version_before_it_in_force(cluster: Home, hooked_app: Path) -> None:
    assert cluster.ask("plain").status_code == 200
    (engine,) = cluster.engines("plain")
    text = hooked_app.read_text()
    try:
        hooked_app.write_text(
            text.replace("cpus=0.3, idle_timeout=300", 'cpus=0.3, engine_args="--max-model-len 99999"')
        )
        said = cluster.fails("deploy", f"{hooked_app}::Plain")
        assert "max_model_len (99999) is greater than the derived max_model_len" in said
        assert "version 1 stays in force" in said and "Traceback" not in said
        hooked_app.write_text(text.replace("cpus=0.3, idle_timeout=300", 'cpus=0.3, engine_args="--no-such-flag 1"'))
        assert "unrecognized arguments: --no-such-flag" in cluster.fails("deploy", f"{hooked_app}::Plain")
    finally:
        hooked_app.write_text(text)
    assert [p.pid for p in cluster.engines("plain")] == [engine.pid]
    assert cluster.ask("plain").status_code == 200 and cluster.status("plain")["version"] == 1


def test_a_version_that_has_no_room_beside_the_one_before_waits_until_that_has_drained(
    cluster: Home, tmp_path: Path
) -> None:
    (engine,) = cluster.engines("smollm2")
    other = tmp_path / "smollm2" / "app.py"
    other.parent.mkdir()
    text = EXAMPLE.read_text()
    other.write_text(text.replace("aliases=", 'cpus=1.3, engine_args="--no-such-flag 1", aliases='))
    said = cluster.fails("deploy", other, "--adopt")
    assert "no room beside version 3: it drains first, requests wait" in said
    assert "unrecognized arguments" in said and "version 3 stays in force" in said
    assert not alive(engine)
    assert "Paris" in cluster.ask("smollm2", PARIS).text


def test_a_redeploy_loses_no_request(cluster: Home, hooked_app: Path) -> None:
    before = cluster.engines("plain")
    assert len(before) == 1
    stop, codes = threading.Event(), list[int]()

    def keep_asking() -> None:
        while not stop.is_set():
            codes.append(cluster.ask("plain").status_code)
            stop.wait(0.1)

    callers = [threading.Thread(target=keep_asking) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        text = hooked_app.read_text()
        hooked_app.write_text(
            text.replace("cpus=0.3, idle_timeout=300", 'cpus=0.3, engine_args="--max-model-len 1024"')
        )
        said = cluster.ok("deploy", f"{hooked_app}::plain")
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert "~ plain  (a new engine" in said and "engine_args {} → {max_model_len: 1024}" in said
    assert len(codes) > 10 and set(codes) == {200}
    until(lambda: not any(map(alive, before)), 30, "the version before has drained")
    assert cluster.status("plain")["version"] == 4


def test_what_is_killed_comes_back(cluster: Home) -> None:
    (engine,) = cluster.engines("plain")
    family: list[psutil.Process] = [engine, *engine.children(recursive=True)]
    find_actor(cluster, "ray::ServeReplica:llmrun-plain").kill()
    until(lambda: not any(alive(process) for process in family), 10, "the engine has ended with its replica")
    assert cluster.ask("plain").status_code == 200

    (engine,) = cluster.engines("plain")
    (core,) = [child for child in engine.children() if "EngineCore" in " ".join(child.cmdline())]
    core.kill()
    until(lambda: not alive(engine), 30, "the engine has ended with its core")
    until(lambda: "the engine died" in cluster.status("plain")["cause"], 10, "status says so")
    assert cluster.ask("plain").status_code == 200
    assert cluster.status("plain")["cause"] == ""

    for actor in ("ray::Control", "ray::IngressActor"):
        find_actor(cluster, actor).kill()
        until(lambda: healthy(cluster), 30, f"the endpoint is back without {actor}")
        assert cluster.ask("plain").status_code == 200
        assert cluster.wait_for("plain", "hot")["version"] == 4


def family_of(pid: int, title: str) -> list[psutil.Process]:
    """The processes below `pid` with that in their titles."""
    return [p for p in psutil.Process(pid).children(recursive=True) if alive(p) and title in " ".join(p.cmdline())]


def find_actor(cluster: Home, title: str) -> psutil.Process:
    """The process of one of this cluster's actors."""
    parent = psutil.Process(json.loads((cluster.path / "cluster.json").read_text())["pid"])
    found = [p for p in parent.children(recursive=True) if " ".join(p.cmdline()).startswith(title)]
    assert len(found) == 1, found
    return found[0]


def healthy(cluster: Home) -> bool:
    """Whether the ingress and control answer."""
    return cluster.run("status").returncode == 0


def test_models_that_left_the_file_stay_until_pruned(cluster: Home, hooked_app: Path) -> None:
    text = hooked_app.read_text()
    hooked_app.write_text(text[: text.rindex("@llm(")])
    code, shown = cluster.on_a_terminal("deploy", hooked_app, answers="n\nn\n")
    assert code == 1 and "Remove plain, no longer in the file? [y/N]" in shown and "Deploy? [Y/n]" in shown
    said = cluster.ok("deploy", hooked_app, "--no-wait", "--lazy")
    assert "- plain" in said and "kept, though no longer in the file: plain" in said
    assert cluster.ask("plain").status_code == 200
    hooked_app.write_text(hooked_app.read_text() + "\n# another package\n")
    assert "removed" in cluster.ok("deploy", hooked_app, "--lazy", "--prune")
    assert cluster.ask("plain").json()["error"]["code"] == "model_not_found"
    assert "no wheel" in cluster.ask("hooked", "tell").text
    hooked_app.write_text(text)


def test_no_room_for_the_proof_is_said_with_who_holds_it(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    app = write_app(tmp_path / "big.py", f"@llm({str(tiny_weights)!r}, cpus={os.cpu_count()})\nclass Big: ...\n")
    said = cluster.ok("deploy", app)
    assert "deployed, not proven: no room now" in said and "held by" in said and "smollm2" in said
    assert cluster.status("big")["state"] == "cold"
    assert "removed big" in cluster.ok("delete", "big", "--yes")


def test_two_nodes(cluster: Home, tmp_path: Path, hooked_app: Path) -> None:
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
            "the node joined",
        )
        said = cluster.ok("deploy", f"{away}::Away")
        assert "+ away" in said and "on 1 × A10G" in said
        assert "second" in cluster.ask("away", "tell").text
        assert list((second / "packages").iterdir()) and not list((second / "packages").glob(".new-*"))
        assert cluster.engines("away")
        assert len(list((second / "logs" / "models" / "away").iterdir())) == 1
        assert "engine ready after" in cluster.ok("logs", "away")
        cluster.wait_for("away", "cold", 30)
        assert not cluster.engines("away")
        assert "removed away" in cluster.ok("delete", "--app", "away", "--yes")
        until(lambda: not family_of(node.pid, "ServeReplica"), 30, "the replica and its engine have ended")


def test_chat_streams_and_converses(cluster: Home) -> None:
    assert "Paris" in cluster.ok("chat", "smollm2", PARIS, "--temperature", "0")
    done = subprocess.run(
        [BIN / "llmrun", "chat", "smollm2", "--max-tokens", "5"],
        env=cluster.env,
        input="Hello!\nAnd again!\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and len(re.findall(r"^> ", done.stdout, re.M)) >= 1
    assert "does not exist" in cluster.fails("chat", "nobody", "Hello")


def test_what_was_deployed_is_deployed_again_after_down_and_up(cluster: Home) -> None:
    models = {model["name"] for model in json.loads(cluster.ok("status", "--json"))["models"]}
    assert "ended" in cluster.ok("down")
    assert "nothing of llmrun's answers" in cluster.fails("status")
    cluster.ok("up", "--node-ip", "127.0.0.2")
    status = json.loads(cluster.ok("status", "--json"))
    assert {model["name"] for model in status["models"]} == models
    assert {model["state"] for model in status["models"]} == {"cold"}
    assert "Paris" in cluster.ask("smollm2", PARIS).text


def test_two_homes_on_two_ports_do_not_meet(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    other = Home(tmp_path / "other", free_port())
    other.path.mkdir()
    stale = {"url": other.url, "pid": 2**22 - 1, "temp": str(tmp_path / "gone"), "ray_address": ""}
    (other.path / "cluster.json").write_text(json.dumps(stale))  # as a parent leaves it that was killed
    app = write_app(tmp_path / "app.py", f'@llm("{tiny_weights}")\nclass One: ...\n')
    said = other.ok("deploy", app, "--dry-run", LLMRUN_URL="", LLMRUN_FORKSERVER="0")
    assert f"nothing listens at {other.url}: starting a cluster" in said and f"+ one  {tiny_weights}, on CPU" in said
    try:
        assert "nothing is deployed" in other.ok("status")
        assert "runs already" in other.fails("up")
        key = (cluster.path / "admin.key").read_text()
        assert "wrong admin key" in other.fails("status", LLMRUN_ADMIN_KEY=key)
        assert (other.path / "admin.key").stat().st_mode & 0o777 == 0o600
        parent = psutil.Process(json.loads((other.path / "cluster.json").read_text())["pid"])
        sockets = [c for p in parent.children(recursive=True) for c in p.net_connections("tcp") if c.status == "LISTEN"]
        assert len(sockets) > 5
        assert {c.laddr.ip for c in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        # It was told to keep no warm parent: engines start plainly.
        other.ok("deploy", app, "--lazy")
        assert other.ask("one").status_code == 200
        family = [" ".join(p.cmdline()) for p in parent.children(recursive=True)]
        assert len(family) > 5 and not any("warm parent" in line for line in family)
        row = until(lambda: other.starts("one"), 10, "its start is noted")[0]
        assert not row["forked"]
    finally:
        other.ok("down")
    assert cluster.status("smollm2")["name"] == "smollm2"


def test_a_remote_command_line_needs_only_url_and_key(cluster: Home, tmp_path: Path) -> None:
    key = (cluster.path / "admin.key").read_text()
    away = Home(tmp_path / "away", cluster.port)
    assert "no admin key" in away.fails("status")
    assert "smollm2" in away.ok("status", LLMRUN_ADMIN_KEY=key)
    assert not away.path.exists()


def test_a_model_without_a_file_and_a_ctrl_c_that_cancels_nothing(cluster: Home, tiny_weights: Path) -> None:
    deploy = subprocess.Popen(
        [BIN / "llmrun", "deploy", f"file://{tiny_weights}", "--name", "bare", "--", "--max-model-len", "512"],
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as these tests may be one, is deaf to SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert deploy.stderr
    seen = ""
    while "starting the engine" not in seen:
        seen += deploy.stderr.readline()
    assert "+ bare" in seen and cluster.status("bare")["state"] == "waking"
    deploy.send_signal(signal.SIGINT)
    assert "the deploy goes on" in deploy.communicate(timeout=20)[1] and deploy.returncode == 130
    status = cluster.wait_for("bare", "hot", ENGINE_START_S)
    assert status["version"] == 1 and status["proven"]
    assert cluster.ask("bare", max_tokens=5000).status_code == 400
    assert "removed bare" in cluster.ok("delete", "bare", "--yes")


def test_a_wake_that_fails_is_told_to_who_waits_and_the_next_one_tries_again(
    cluster: Home, tmp_path: Path, tiny_weights: Path
) -> None:
    folder = tmp_path / "weights"
    folder.symlink_to(tiny_weights)
    cluster.ok("deploy", str(folder), "--name", "moving", "--lazy")
    folder.unlink()
    for _ in range(2):
        answer = cluster.ask("moving")
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert "moving did not start: model=" in answer.text and "there is no such path on node" in answer.text
    status = cluster.wait_for("moving", "failed")
    assert "no such path" in status["cause"] and "no such path" in cluster.ok("status")
    folder.symlink_to(tiny_weights)
    assert cluster.ask("moving").status_code == 200
    assert cluster.status("moving")["cause"] == ""
    assert "removed moving" in cluster.ok("delete", "moving", "--yes")


def test_delete(cluster: Home) -> None:
    assert "removed smollm2" in cluster.ok("delete", "smollm2", "--yes")
    until(lambda: not cluster.engines("smollm2"), 30, "the engine has ended")
    assert "there is no model" in cluster.fails("delete", "smollm2", "--yes")
    assert "there is no app" in cluster.fails("delete", "--app", "smollm2", "--yes")
