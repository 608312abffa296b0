"""The contract of all engines: the same tests run against each engine, through the CLI."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.support.cluster import ENGINE_START_S, SMOLLM2, Home, alive, until, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ENGINES = ("vllm", "transformers")
PARIS = "Name the capital of France."
# A prompt that the model continues without stopping.
COUNTING = " ".join(map(str, range(1, 40)))


@pytest.fixture(scope="module", params=ENGINES)
def kind(request: pytest.FixtureRequest, cluster: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Deploy a model with a hook and an alias, named after its engine; yield the name."""
    text = f"""
@llm({str(SMOLLM2)!r}, name={request.param!r}, engine={request.param!r}, aliases=["acme/{request.param}"], cpus=0.3,
     idle_timeout=600)
class Model:
    def on_request(self, request):
        if request.get("user") == "wrong":
            raise ValueError("no such user")
        return request
"""
    path = write_app(tmp_path_factory.mktemp("engines") / request.param / "app.py", text)
    assert f"+ {request.param}" in cluster.ok("deploy", path)
    yield request.param
    cluster.ok("delete", request.param, "--yes")


@pytest.fixture(scope="module")
def client(cluster: Home) -> Iterator[openai.OpenAI]:
    """The official OpenAI client."""
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=ENGINE_START_S, max_retries=0) as client:
        yield client


def test_name_and_alias_work_with_and_without_streaming(kind: str, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"messages": [{"role": "user", "content": PARIS}], "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(model=kind, **options)
    assert "Paris" in str(whole.choices[0].message.content) and whole.model == kind
    assert whole.usage and whole.usage.completion_tokens > 3
    chunks = list(client.chat.completions.create(model=f"acme/{kind}", stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text and len(chunks) > 3 and {chunk.model for chunk in chunks} <= {kind, f"acme/{kind}"}
    ended = client.completions.create(model=kind, prompt="Paris is the capital of", max_tokens=4, temperature=0)
    assert ended.choices[0].text and ended.usage and ended.usage.completion_tokens == 4


def test_errors_use_the_openai_format(kind: str, cluster: Home, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as failed:
        client.chat.completions.create(**{"model": kind, "messages": "no list"})  # type: ignore[call-overload]
    # `transformers serve` itself fails on this request, with a response that is not JSON.
    assert failed.value.status_code == (500 if kind == "transformers" else 400)
    assert isinstance(failed.value.body, dict) and failed.value.body["message"]
    refused = cluster.ask(kind, user="wrong")
    assert refused.status_code == 500 and "no such user" in refused.json()["error"]["message"]
    nowhere = httpx.post(f"{cluster.url}/v1/audio/translations", json={"model": kind}, timeout=60)
    assert nowhere.status_code == 404


def test_usage_is_counted(kind: str, cluster: Home) -> None:
    def used() -> int:
        rows = json.loads(cluster.ok("usage", "--by", "model", "--json"))
        return sum(row["completion_tokens"] for row in rows if row["model"] == kind)

    before = used()
    answer = cluster.ask(kind, PARIS, max_tokens=6).json()
    tokens = answer["usage"]["completion_tokens"]
    # It can be more if an earlier test's usage arrives only now.
    until(lambda: used() - before >= tokens, 20, f"{tokens} more tokens appear in the usage")


def test_the_pace_of_streams_is_measured(kind: str, cluster: Home) -> None:
    def streams() -> float:
        count = f'llmrun_time_per_output_token_seconds_count{{adapter="",model="{kind}"}} '
        lines = httpx.get(f"{cluster.url}/metrics").text.splitlines()
        return sum(float(line.removeprefix(count)) for line in lines if line.startswith(count))

    before = streams()
    assert cluster.ask(kind, PARIS, stream=True).status_code == 200
    until(lambda: streams() == before + 1, 20, "one more stream is counted")


def test_only_the_ingress_can_reach_the_engine(kind: str, cluster: Home) -> None:
    address = cluster.wait_for(kind, "hot")["details"][0]["address"]
    assert httpx.get(f"http://{address}/v1/models").status_code == 401


def test_a_disconnected_request_is_no_longer_in_flight(kind: str, cluster: Home) -> None:
    body = {"model": kind, "prompt": COUNTING, "max_tokens": 1500, "stream": True, "temperature": 0}
    body |= {"ignore_eos": True} if kind == "vllm" else {}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=ENGINE_START_S) as stream:
        lines = stream.iter_lines()  # httpx closes the stream when the iterator is garbage-collected
        next(lines)
        until(lambda: cluster.status(kind)["in_flight"] == 1, 10, "the request is in flight")
    until(lambda: cluster.status(kind)["in_flight"] == 0, 20, "nothing is in flight")
    until(lambda: quiet(family(cluster, kind)), 60, "the engine is idle")


def test_killed_replicas_and_engines_are_replaced(kind: str, cluster: Home) -> None:
    before = family(cluster, kind)
    assert before
    parent = psutil.Process(json.loads((cluster.path / "cluster.json").read_text())["pid"])
    title = f"ray::ServeReplica:llmrun-{kind}"
    (replica,) = [p for p in parent.children(recursive=True) if " ".join(p.cmdline()).startswith(title)]
    replica.kill()
    until(lambda: not any(map(alive, before)), 15, "the engine exits with its replica")
    assert cluster.ask(kind, PARIS).status_code == 200
    leaf = [process for process in family(cluster, kind) if not process.children()][-1]
    leaf.kill()
    until(lambda: "the engine died" in cluster.status(kind)["cause"], 30, "the status reports the dead engine")
    assert cluster.ask(kind, PARIS).status_code == 200


def test_unload_waits_for_a_stream_and_the_model_wakes_again(kind: str, cluster: Home) -> None:
    events: list[str] = []

    def stream() -> None:
        body = {"model": kind, "prompt": COUNTING, "max_tokens": 60, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=ENGINE_START_S) as answer:
            events.extend(line for line in answer.iter_lines() if line.startswith("data: "))

    before = family(cluster, kind)
    caller = threading.Thread(target=stream)
    caller.start()
    until(lambda: cluster.status(kind)["in_flight"] == 1, 20, "the stream is in flight")
    cluster.ok("unload", kind)
    caller.join()
    assert events[-1] == "data: [DONE]" and len(events) > 10
    cluster.wait_for(kind, "cold", 60)
    until(lambda: not any(map(alive, before)), 15, "all its processes exit")
    started = time.monotonic()
    assert cluster.ask(kind, PARIS).status_code == 200
    print(f"{kind}: {time.monotonic() - started:.1f} s from zero")


def test_an_unknown_engine_argument_is_reported(kind: str, cluster: Home, tmp_path: Path) -> None:
    text = f'@llm({str(SMOLLM2)!r}, name="odd", engine={kind!r}, cpus=0.3, engine_args="--no-such-flag 1")\n'
    error = cluster.fails("deploy", write_app(tmp_path / "odd.py", f"{text}class Odd: ...\n"))
    assert "no-such-flag" in error and "exit code" not in error


def test_deploy_rejects_features_that_the_engine_lacks(cluster: Home, tmp_path: Path) -> None:
    def refused(arguments: str) -> str:
        text = f'@llm({str(SMOLLM2)!r}, name="odd", cpus=0.3, {arguments})\nclass Odd: ...\n'
        return cluster.fails("deploy", write_app(tmp_path / "odd.py", text))

    assert "engine='transformers' does not support adapters" in refused('engine="transformers", lora="./adapters"')
    assert "engine='transformers' does not support task='embed'" in refused('engine="transformers", task="embed"')
    assert "sglang is not installed on the node: pip install sglang" in refused('engine="sglang"')


def family(cluster: Home, kind: str) -> list[psutil.Process]:
    """Return all processes of the model's engines."""
    engines = cluster.engines(kind)
    return [process for engine in engines for process in (engine, *engine.children(recursive=True))]


def quiet(processes: list[psutil.Process]) -> bool:
    """Return whether the processes use almost no CPU for half a second."""
    return sum(process.cpu_percent(0.5 / len(processes)) for process in processes) < 30
