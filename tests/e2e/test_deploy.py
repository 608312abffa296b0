"""Deploy the example with the real CLI, Ray and vLLM on CPU."""

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
# The answer must win by a wide margin: CPUs round differently (with or without AMX), which can sway a 135M model.
PARIS = "Name the capital of France."


@pytest.fixture(scope="module")
def openai(cluster: Home) -> Iterator[OpenAI]:
    """The official OpenAI client."""
    with OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=ENGINE_START_S, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def imported(cluster: Home) -> str:
    """Import the example's weights; return the output of the command."""
    return cluster.ok("weights", "import", SMOLLM2, "--as", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.fixture(scope="module", autouse=True)
def cleanup(cluster: Home) -> Iterator[None]:
    """Delete the example after the last test."""
    yield
    if cluster.find("smollm2"):
        cluster.ok("delete", "smollm2", "--yes")


@pytest.fixture
def smollm2(cluster: Home, imported: str) -> dict[str, Any]:
    """Deploy the unmodified example, make it hot and return its status. Tests may change the deployment."""
    cluster.ok("deploy", EXAMPLE, "--adopt")
    cluster.make_hot("smollm2")
    return cluster.status("smollm2")


def test_the_example_works_with_the_openai_client(cluster: Home, imported: str, openai: OpenAI) -> None:
    if cluster.find("smollm2"):
        cluster.ok("delete", "smollm2", "--yes")
    assert "imported" in imported
    output = cluster.ok("deploy", EXAMPLE)
    assert "+ smollm2" in output and f"{cluster.url}/v1" in output and "curl " in output

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
    names = {name for model in cluster.models() for name in (model["name"], *model["aliases"])}
    assert {model.id for model in openai.models.list()} == names
    assert openai.models.retrieve("HuggingFaceTB/SmolLM2-135M-Instruct").object == "model"


def test_a_second_deploy_changes_nothing_and_is_fast(cluster: Home, smollm2: dict[str, Any]) -> None:
    (engine,) = cluster.engines("smollm2")
    started = time.monotonic()
    output = cluster.ok("deploy", EXAMPLE)
    assert time.monotonic() - started < 3
    assert "no changes" in output
    assert [p.pid for p in cluster.engines("smollm2")] == [engine.pid]


def test_scaling_options_change_without_a_restart(cluster: Home, tmp_path: Path, smollm2: dict[str, Any]) -> None:
    (engine,) = cluster.engines("smollm2")
    text = EXAMPLE.read_text()
    other = tmp_path / "smollm2" / "app.py"
    other.parent.mkdir()
    other.write_text(text.replace("aliases=", "max_replicas=2, idle_timeout=600, aliases="))
    assert "last deployed from" in cluster.fails("deploy", other)
    output = cluster.ok("deploy", other, "--adopt")
    assert "~ smollm2  (no restart)" in output and "max_replicas 1 → 2" in output and "idle_timeout 300 → 600" in output
    assert [p.pid for p in cluster.engines("smollm2")] == [engine.pid]
    assert cluster.status("smollm2")["version"] == smollm2["version"] + 1
    assert "max_replicas 2 → 1" in cluster.ok("deploy", EXAMPLE, "--adopt")


def test_idle_cluster_uses_under_2_gib_besides_engines_and_fork_server(cluster: Home, smollm2: dict[str, Any]) -> None:
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
def test_deploy_rejects_foreseeable_failures(
    cluster: Home, tmp_path: Path, smollm2: dict[str, Any], model: str, arguments: str, words: list[str]
) -> None:
    error = cluster.fails("deploy", write_app(tmp_path / "bad.py", f"@llm({model!r}, {arguments})\nclass One: ...\n"))
    for word in words:
        assert word in error


def test_only_the_ingress_can_reach_an_engine(cluster: Home, smollm2: dict[str, Any]) -> None:
    address = cluster.wait_for("smollm2", "hot")["details"][0]["address"]
    for path in ("/v1/models", "/health", "/metrics", "/_llmrun/state"):
        assert httpx.get(f"http://{address}{path}").status_code == 401
    assert httpx.post(f"{cluster.url}/metrics", json={"model": "smollm2"}).status_code == 405  # control's own path
    for path in ("/v1/load_lora_adapter", "/v1/embeddings", "/_llmrun/state", "/reset_prefix_cache"):
        assert httpx.post(f"{cluster.url}{path}", json={"model": "smollm2"}).status_code == 404


def test_without_capacity_for_both_versions_the_old_one_drains_first(
    cluster: Home, tmp_path: Path, smollm2: dict[str, Any]
) -> None:
    version = smollm2["version"]
    (engine,) = cluster.engines("smollm2")
    other = tmp_path / "smollm2" / "app.py"
    other.parent.mkdir()
    text = EXAMPLE.read_text()
    other.write_text(text.replace("aliases=", 'cpus=1.3, engine_args="--no-such-flag 1", aliases='))
    error = cluster.fails("deploy", other, "--adopt")
    assert f"not enough capacity next to version {version}: draining it first, requests are queued" in error
    assert "unrecognized arguments" in error and f"version {version} stays active" in error
    assert not alive(engine)
    assert "Paris" in cluster.ask("smollm2", PARIS).text


def test_deploy_without_capacity_for_the_proof_names_the_users(
    cluster: Home, tmp_path: Path, tiny_weights: Path, smollm2: dict[str, Any]
) -> None:
    app = write_app(tmp_path / "big.py", f"@llm({str(tiny_weights)!r}, cpus={os.cpu_count()})\nclass Big: ...\n")
    output = cluster.ok("deploy", app)
    assert "deployed, not proven: not enough capacity" in output and "in use by" in output and "smollm2" in output
    assert cluster.status("big")["state"] == "cold"
    assert "Deleted big" in cluster.ok("delete", "big", "--yes")


def test_chat_streams_and_holds_a_conversation(cluster: Home, smollm2: dict[str, Any]) -> None:
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


def test_deployed_models_are_restored_after_down_and_up(cluster: Home, smollm2: dict[str, Any]) -> None:
    models = {model["name"] for model in json.loads(cluster.ok("status", "--json"))["models"]}
    assert "Cluster stopped" in cluster.ok("down")
    assert "cannot reach llmrun at" in cluster.fails("status")
    cluster.ok("up", "--node-ip", "127.0.0.2")
    status = json.loads(cluster.ok("status", "--json"))
    assert {model["name"] for model in status["models"]} == models
    assert {model["state"] for model in status["models"]} == {"cold"}
    assert "Paris" in cluster.ask("smollm2", PARIS).text


def test_two_homes_on_two_ports_are_independent(
    cluster: Home, tmp_path: Path, tiny_weights: Path, smollm2: dict[str, Any]
) -> None:
    other = Home(tmp_path / "other", free_port())
    other.path.mkdir()
    stale = {"url": other.url, "pid": 2**22 - 1, "temp": str(tmp_path / "gone"), "ray_address": ""}
    (other.path / "cluster.json").write_text(json.dumps(stale))  # left behind by a killed parent
    app = write_app(tmp_path / "app.py", f'@llm("{tiny_weights}")\nclass One: ...\n')
    output = other.ok("deploy", app, "--dry-run", LLMRUN_URL="", LLMRUN_FORKSERVER="0")
    assert f"No cluster at {other.url}. Starting one" in output and f"+ one  {tiny_weights}, on CPU" in output
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
        # The fork server is disabled, so engines start without a fork.
        other.ok("deploy", app, "--lazy")
        assert other.ask("one").status_code == 200
        family = [" ".join(p.cmdline()) for p in parent.children(recursive=True)]
        assert len(family) > 5 and not any("fork server" in line for line in family)
        row = until(lambda: other.starts("one"), 10, "its start is recorded")[0]
        assert not row["forked"]
    finally:
        other.ok("down")
    assert cluster.status("smollm2")["name"] == "smollm2"


def test_the_remote_cli_needs_only_a_url_and_a_key(cluster: Home, tmp_path: Path, smollm2: dict[str, Any]) -> None:
    key = (cluster.path / "admin.key").read_text()
    away = Home(tmp_path / "away", cluster.port)
    assert "an admin key is required" in away.fails("status")
    assert "smollm2" in away.ok("status", LLMRUN_ADMIN_KEY=key)
    assert not away.path.exists()


def test_deploy_without_an_app_file_continues_after_ctrl_c(cluster: Home, tiny_weights: Path) -> None:
    deploy = subprocess.Popen(
        [BIN / "llmrun", "deploy", f"file://{tiny_weights}", "--name", "bare", "--", "--max-model-len", "512"],
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # These tests may run as a shell's background job, which ignores SIGINT.
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


def test_a_failed_wake_is_reported_and_the_next_request_retries(
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


def test_delete_removes_the_model_and_its_engine(cluster: Home, smollm2: dict[str, Any]) -> None:
    assert "Deleted smollm2" in cluster.ok("delete", "smollm2", "--yes")
    until(lambda: not cluster.engines("smollm2"), 30, "the engine exits")
    assert "not found; available:" in cluster.fails("delete", "smollm2", "--yes")
    assert "app 'smollm2' not found" in cluster.fails("delete", "--app", "smollm2", "--yes")
