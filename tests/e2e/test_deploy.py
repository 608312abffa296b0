"""Deploying the example, through the real command line, a real Ray and real vLLM on CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
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
def imported(cluster: Home) -> str:
    """The example's weights are on the node; the command's output."""
    return cluster.ok("weights", "import", SMOLLM2, "--as", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.fixture(scope="module", autouse=True)
def cleanup(cluster: Home) -> Iterator[None]:
    """The example is deleted after the last test."""
    yield
    if cluster.find("smollm2"):
        cluster.ok("delete", "smollm2", "--yes")


@pytest.fixture
def smollm2(cluster: Home, imported: str) -> dict[str, Any]:
    """The example is deployed as its file has it, and hot; its status. A test may change it."""
    cluster.ok("deploy", EXAMPLE, "--adopt")
    cluster.make_hot("smollm2")
    return cluster.status("smollm2")


def test_the_example_answers_any_openai_client(cluster: Home, imported: str, openai: OpenAI) -> None:
    if cluster.find("smollm2"):
        cluster.ok("delete", "smollm2", "--yes")
    assert "imported" in imported
    said = cluster.ok("deploy", EXAMPLE)
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
    assert {model.id for model in openai.models.list()} == {model["name"] for model in cluster.models()}
    assert openai.models.retrieve("HuggingFaceTB/SmolLM2-135M-Instruct").object == "model"


def test_a_second_deploy_changes_nothing_and_is_quick(cluster: Home, smollm2: dict[str, Any]) -> None:
    (engine,) = cluster.engines("smollm2")
    begun = time.monotonic()
    said = cluster.ok("deploy", EXAMPLE)
    assert time.monotonic() - begun < 3
    assert "no changes" in said
    assert [p.pid for p in cluster.engines("smollm2")] == [engine.pid]


def test_numbers_change_without_a_restart(cluster: Home, tmp_path: Path, smollm2: dict[str, Any]) -> None:
    (engine,) = cluster.engines("smollm2")
    text = EXAMPLE.read_text()
    other = tmp_path / "smollm2" / "app.py"
    other.parent.mkdir()
    other.write_text(text.replace("aliases=", "max_replicas=2, idle_timeout=600, aliases="))
    assert "last deployed from" in cluster.fails("deploy", other)
    said = cluster.ok("deploy", other, "--adopt")
    assert "~ smollm2  (no restart)" in said and "max_replicas 1 → 2" in said and "idle_timeout 300 → 600" in said
    assert [p.pid for p in cluster.engines("smollm2")] == [engine.pid]
    assert cluster.status("smollm2")["version"] == smollm2["version"] + 1
    assert "max_replicas 2 → 1" in cluster.ok("deploy", EXAMPLE, "--adopt")


def test_an_idle_cluster_takes_less_than_2_gib_beside_its_engines_and_their_warm_parent(
    cluster: Home, smollm2: dict[str, Any]
) -> None:
    parent = psutil.Process(json.loads((cluster.path / "cluster.json").read_text())["pid"])
    engines = {p.pid for engine in cluster.engines("smollm2") for p in (engine, *engine.children(recursive=True))}
    family = [process for process in (parent, *parent.children(recursive=True)) if process.pid not in engines]
    warm = [process for process in family if "llmrun: fork server" in " ".join(process.cmdline())]
    assert [process.memory_info().rss < 2**30 for process in warm] == [True]
    rest = sum(process.memory_info().rss for process in family) - warm[0].memory_info().rss
    assert len(family) > 8 and rest < 2 * 2**30


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("org/model", 'accelerator="H100"', ["one: accelerator='H100': no node has 1 × H100", "The cluster has"]),
        ("org/model", "cpus=500", ["cpus=500", "no node has 500 CPUs"]),
        ("s3://acme/model", "", ["s3://acme/model: access denied", "set AWS_ACCESS_KEY_ID", "on node 127.0.0.2"]),
        ("org/model", "", ["org/model: ", "cannot reach the Hub at", "llmrun weights import DIR --as org/model"]),
        ("./nowhere", "", ["nowhere'", "path not found"]),
        ("org/model", 'engine="tgi"', ["engine='tgi'", "available: sglang, stub, transformers, vllm"]),
        ("org/model", 'aliases=["smollm2"]', ["'smollm2' belongs to model smollm2 of app smollm2"]),
    ],
)
def test_what_can_be_known_to_fail_is_refused_at_deploy(
    cluster: Home, tmp_path: Path, smollm2: dict[str, Any], model: str, arguments: str, words: list[str]
) -> None:
    said = cluster.fails("deploy", write_app(tmp_path / "bad.py", f"@llm({model!r}, {arguments})\nclass One: ...\n"))
    for word in words:
        assert word in said


def test_only_the_ingress_reaches_an_engine(cluster: Home, smollm2: dict[str, Any]) -> None:
    address = cluster.wait_for("smollm2", "hot")["details"][0]["address"]
    for path in ("/v1/models", "/health", "/metrics", "/_llmrun/state"):
        assert httpx.get(f"http://{address}{path}").status_code == 401
    assert httpx.post(f"{cluster.url}/metrics", json={"model": "smollm2"}).status_code == 405  # control's own
    for path in ("/v1/load_lora_adapter", "/v1/embeddings", "/_llmrun/state", "/reset_prefix_cache"):
        assert httpx.post(f"{cluster.url}{path}", json={"model": "smollm2"}).status_code == 404


def test_a_version_that_has_no_room_beside_the_one_before_waits_until_that_has_drained(
    cluster: Home, tmp_path: Path, smollm2: dict[str, Any]
) -> None:
    version = smollm2["version"]
    (engine,) = cluster.engines("smollm2")
    other = tmp_path / "smollm2" / "app.py"
    other.parent.mkdir()
    text = EXAMPLE.read_text()
    other.write_text(text.replace("aliases=", 'cpus=1.3, engine_args="--no-such-flag 1", aliases='))
    said = cluster.fails("deploy", other, "--adopt")
    assert f"not enough capacity next to version {version}: draining it first, requests are queued" in said
    assert "unrecognized arguments" in said and f"version {version} stays active" in said
    assert not alive(engine)
    assert "Paris" in cluster.ask("smollm2", PARIS).text


def test_no_room_for_the_proof_is_said_with_who_holds_it(
    cluster: Home, tmp_path: Path, tiny_weights: Path, smollm2: dict[str, Any]
) -> None:
    app = write_app(tmp_path / "big.py", f"@llm({str(tiny_weights)!r}, cpus={os.cpu_count()})\nclass Big: ...\n")
    said = cluster.ok("deploy", app)
    assert "deployed, not proven: not enough capacity" in said and "in use by" in said and "smollm2" in said
    assert cluster.status("big")["state"] == "cold"
    assert "Deleted big" in cluster.ok("delete", "big", "--yes")


def test_chat_streams_and_converses(cluster: Home, smollm2: dict[str, Any]) -> None:
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
    assert "model 'nobody' not found" in cluster.fails("chat", "nobody", "Hello")


def test_what_was_deployed_is_deployed_again_after_down_and_up(cluster: Home, smollm2: dict[str, Any]) -> None:
    models = {model["name"] for model in json.loads(cluster.ok("status", "--json"))["models"]}
    assert "Cluster stopped" in cluster.ok("down")
    assert "cannot reach llmrun at" in cluster.fails("status")
    cluster.ok("up", "--node-ip", "127.0.0.2")
    status = json.loads(cluster.ok("status", "--json"))
    assert {model["name"] for model in status["models"]} == models
    assert {model["state"] for model in status["models"]} == {"cold"}
    assert "Paris" in cluster.ask("smollm2", PARIS).text


def test_two_homes_on_two_ports_do_not_meet(
    cluster: Home, tmp_path: Path, tiny_weights: Path, smollm2: dict[str, Any]
) -> None:
    other = Home(tmp_path / "other", free_port())
    other.path.mkdir()
    stale = {"url": other.url, "pid": 2**22 - 1, "temp": str(tmp_path / "gone"), "ray_address": ""}
    (other.path / "cluster.json").write_text(json.dumps(stale))  # as a parent leaves it that was killed
    app = write_app(tmp_path / "app.py", f'@llm("{tiny_weights}")\nclass One: ...\n')
    said = other.ok("deploy", app, "--dry-run", LLMRUN_URL="", LLMRUN_FORKSERVER="0")
    assert f"No cluster at {other.url}. Starting one" in said and f"+ one  {tiny_weights}, on CPU" in said
    try:
        assert "No models deployed" in other.ok("status")
        assert "is already running" in other.fails("up")
        key = (cluster.path / "admin.key").read_text()
        assert "invalid admin key" in other.fails("status", LLMRUN_ADMIN_KEY=key)
        assert (other.path / "admin.key").stat().st_mode & 0o777 == 0o600
        parent = psutil.Process(json.loads((other.path / "cluster.json").read_text())["pid"])
        sockets = [c for p in parent.children(recursive=True) for c in p.net_connections("tcp") if c.status == "LISTEN"]
        assert len(sockets) > 5
        assert {c.laddr.ip for c in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        # It was told to keep no warm parent: engines start plainly.
        other.ok("deploy", app, "--lazy")
        assert other.ask("one").status_code == 200
        family = [" ".join(p.cmdline()) for p in parent.children(recursive=True)]
        assert len(family) > 5 and not any("fork server" in line for line in family)
        row = until(lambda: other.starts("one"), 10, "its start is noted")[0]
        assert not row["forked"]
    finally:
        other.ok("down")
    assert cluster.status("smollm2")["name"] == "smollm2"


def test_a_remote_command_line_needs_only_url_and_key(cluster: Home, tmp_path: Path, smollm2: dict[str, Any]) -> None:
    key = (cluster.path / "admin.key").read_text()
    away = Home(tmp_path / "away", cluster.port)
    assert "an admin key is required" in away.fails("status")
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
    assert "The deploy continues" in deploy.communicate(timeout=20)[1] and deploy.returncode == 130
    status = cluster.wait_for("bare", "hot", ENGINE_START_S)
    assert status["version"] == 1 and status["proven"]
    assert cluster.ask("bare", max_tokens=5000).status_code == 400
    assert "Deleted bare" in cluster.ok("delete", "bare", "--yes")


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
        assert "moving failed to start: model=" in answer.text and "path not found on node" in answer.text
    status = cluster.wait_for("moving", "failed")
    assert "path not found" in status["cause"] and "path not found" in cluster.ok("status")
    folder.symlink_to(tiny_weights)
    assert cluster.ask("moving").status_code == 200
    assert cluster.status("moving")["cause"] == ""
    assert "Deleted moving" in cluster.ok("delete", "moving", "--yes")


def test_delete(cluster: Home, smollm2: dict[str, Any]) -> None:
    assert "Deleted smollm2" in cluster.ok("delete", "smollm2", "--yes")
    until(lambda: not cluster.engines("smollm2"), 30, "the engine has ended")
    assert "not found; available:" in cluster.fails("delete", "smollm2", "--yes")
    assert "app 'smollm2' not found" in cluster.fails("delete", "--app", "smollm2", "--yes")
