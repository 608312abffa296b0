"""Keys, limits, usage and the engine's other paths, with the CLI, real clients and real vLLM."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from schemathesis.core.result import Ok

from llmrun.wire import KeyInfo
from tests.support.cluster import ENGINE_START_S, Home, free_port, titled, until, write_app
from tests.support.stub_engine import install

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def keyed(cluster: Home, tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[str]:
    """Deploy a tiny model `keyed` and yield the key of `alice`."""
    text = f"@llm({str(tiny_weights)!r}, cpus=0.2, idle_timeout=600)\nclass Keyed: ...\n"
    cluster.ok("deploy", write_app(tmp_path_factory.mktemp("keyed") / "keyed" / "app.py", text))
    assert "No keys" in cluster.ok("key", "list")
    yield create(cluster, "alice", "--rpm", "1000")
    for row in json.loads(cluster.ok("key", "list", "--json")):
        cluster.ok("key", "revoke", row["name"])
    until(lambda: cluster.ask("keyed").status_code == 200, 5, "without keys, access is open again")
    cluster.ok("delete", "keyed", "--yes")


def create(cluster: Home, name: str, *more: str) -> str:
    """Create a key and return it once the ingress accepts it."""
    key = cluster.run("key", "create", name, *more).stdout.strip()
    assert key.startswith("sk-llmrun-")
    until(lambda: ask(cluster, key, model="?").status_code != 401, 2, "the ingress accepts the key")
    return key


def ask(cluster: Home, key: str, **more: Any) -> httpx.Response:
    """Request a completion with the key."""
    body = {"model": "keyed", "prompt": "Hello there", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | more
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=ENGINE_START_S)


def used(cluster: Home, *by: str) -> list[dict[str, Any]]:
    """Return the rows of `llmrun usage --json` after the replicas have reported."""
    time.sleep(1.5)
    rows: list[dict[str, Any]] = json.loads(cluster.ok("usage", *(f"--by={name}" for name in by), "--json"))
    return rows


def test_keys_are_changed_rotated_and_disabled(cluster: Home, keyed: str) -> None:
    old = create(cluster, "carol", "--rpm", "2")  # it asks once
    assert [ask(cluster, old).status_code for _ in range(2)] == [200, 429]
    cluster.ok("key", "update", "carol", "--rpm", "0")
    assert ask(cluster, old).status_code == 200
    new = cluster.run("key", "rotate", "carol", "--keep", "1h").stdout.strip()
    assert new != old and [ask(cluster, key).status_code for key in (old, new)] == [200, 200]
    newest = cluster.run("key", "rotate", "carol").stdout.strip()
    assert [ask(cluster, key).status_code for key in (old, new, newest)] == [401, 401, 200]
    cluster.ok("key", "disable", "carol")
    assert "API key carol is disabled" in ask(cluster, newest).text and "disabled" in cluster.ok("key", "list")
    cluster.ok("key", "enable", "carol")
    assert ask(cluster, newest).status_code == 200
    for args, words in (
        (("update", "carol"), "nothing to change: add an option"),
        (("update", "carol", "--model", "keyed", "--all-models"), "exclude each other"),
        (("update", "nobody", "--rpm", "1"), "key 'nobody' not found; available: alice, carol"),
        (("rotate", "nobody"), "key 'nobody' not found"),
        (("rotate", "carol", "--keep", "5"), "'5': invalid duration; write for example 1h or 7d"),
        (("rotate", "admin", "--keep", "1h"), "the admin key's old secret cannot be kept"),
        (("create", "seer", "--role", "viewer", "--rpm", "5"), "a viewer's key opens no models"),
    ):
        assert words in cluster.fails("key", *args)
    cluster.ok("key", "revoke", "carol")


def test_admins_and_viewers_have_keys_of_their_own(cluster: Home, keyed: str) -> None:
    viewer, admin = create(cluster, "seer", "--role", "viewer"), create(cluster, "boss", "--role", "admin")
    assert ask(cluster, viewer).status_code == 403 and ask(cluster, admin).status_code == 200
    allowed: list[tuple[str, ...]] = [("status",), ("usage",), ("logs", "keyed")]
    refused: list[tuple[str, ...]] = [("unload", "keyed"), ("key", "list"), ("audit",), ("delete", "keyed", "--yes")]
    for command in allowed:
        cluster.ok(*command, LLMRUN_ADMIN_KEY=viewer)
    for command in refused:
        assert "key seer is a viewer's" in cluster.fails(*command, LLMRUN_ADMIN_KEY=viewer)
    cluster.ok("key", "revoke", "seer", LLMRUN_ADMIN_KEY=admin)
    assert "boss" in cluster.ok("audit").splitlines()[-1]
    assert "invalid admin key" in cluster.fails("status", LLMRUN_ADMIN_KEY=viewer)
    before = (cluster.path / "admin.key").read_text()
    after = cluster.run("key", "rotate", "admin").stdout.strip()
    assert (cluster.path / "admin.key").read_text() == after != before
    assert "keyed" in cluster.ok("status")
    assert "invalid admin key" in cluster.fails("status", LLMRUN_ADMIN_KEY=before)
    cluster.ok("key", "revoke", "boss")


def test_keys_are_created_listed_and_revoked(cluster: Home, keyed: str) -> None:
    assert ask(cluster, "").status_code == 401 and ask(cluster, "sk-llmrun-guess").status_code == 401
    assert ask(cluster, keyed).status_code == 200
    bob = create(cluster, "bob", "--model", "keyed", "--tpm", "60", "--expires", "30d")
    rows = {row["name"]: KeyInfo.model_validate(row) for row in json.loads(cluster.ok("key", "list", "--json"))}
    assert rows["bob"].models == ("keyed",) and rows["bob"].tpm == 60 and rows["bob"].expires > time.time() + 86400
    shown = cluster.ok("key", "list")
    assert "alice" in shown and "bob" in shown and bob not in shown
    assert "61 more if this request" in ask(cluster, bob, max_tokens=61).text  # what it may generate is reserved
    assert ask(cluster, bob, max_tokens=50).status_code == 200
    refused = until(lambda: (answer := ask(cluster, bob)).status_code == 429 and answer, 5, "the tpm limit applies")
    assert "tokens per minute (tpm)" in refused.text and 1 <= int(refused.headers["retry-after"]) <= 60
    assert ask(cluster, keyed).status_code == 200
    cluster.ok("key", "revoke", "bob")
    until(lambda: ask(cluster, bob).status_code == 401, 2, "the revoked key is rejected")
    assert "key 'alice' already exists. Revoke it first" in cluster.fails("key", "create", "alice")
    assert "model 'nobody' not found" in cluster.fails("key", "create", "carol", "--model", "nobody")
    assert "invalid key name" in cluster.fails("key", "create", "No Good")
    assert "invalid time; write a duration" in cluster.fails("key", "create", "carol", "--expires", "soon")
    assert "its expiry is in the past" in cluster.fails("key", "create", "carol", "--expires", "2020-01-01")
    assert "key 'carol' not found; available: alice" in cluster.fails("key", "revoke", "carol")
    assert "Paris" not in cluster.ok("chat", "keyed", "Hi", "--max-tokens", "4")  # the admin key works too


def test_usage_matches_the_responses(cluster: Home, keyed: str) -> None:
    dora = create(cluster, "dora")
    client = openai.OpenAI(api_key=dora, base_url=f"{cluster.url}/v1", max_retries=0)
    prompt = completion = 0
    whole = client.chat.completions.create(
        model="keyed", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, n=2, temperature=1
    )
    assert whole.usage
    prompt, completion = whole.usage.prompt_tokens, whole.usage.completion_tokens
    with_usage = client.completions.create(
        model="keyed", prompt="Once", max_tokens=7, stream=True, stream_options={"include_usage": True}
    )
    last = [chunk.usage for chunk in with_usage if chunk.usage][-1]
    client.close()
    prompt, completion = prompt + last.prompt_tokens, completion + last.completion_tokens
    answer = ask(cluster, dora, stream=True, max_tokens=9)
    assert "usage" not in answer.text  # the client did not request it
    prompt, completion = prompt + 2, completion + 9
    (row,) = [row for row in used(cluster, "key") if row["key"] == "dora"]
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (3, prompt, completion)
    shown = cluster.ok("usage", "--by", "model", "--by", "day", "--since", "1d")
    assert "keyed" in shown and "COMPLETION TOKENS" in shown
    assert all(row["key"] != "dora" for row in json.loads(cluster.ok("usage", "--since", "2100-01-01", "--json")))
    assert "invalid time; write a duration" in cluster.fails("usage", "--since", "yesterday")


def metrics(cluster: Home) -> list[Sample]:
    """Return all samples of `/metrics`."""
    text = httpx.get(f"{cluster.url}/metrics").text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def running(cluster: Home) -> float:
    """Return vLLM's gauge of running requests for `keyed`."""
    samples = [s for s in metrics(cluster) if s.name == "vllm:num_requests_running"]
    return sum(s.value for s in samples if s.labels["model"] == "keyed")


def test_the_engine_stops_within_a_second_of_a_disconnect(cluster: Home, keyed: str) -> None:
    def tokens() -> int:
        return sum(row["completion_tokens"] for row in used(cluster, "key") if row["key"] == "alice")

    before = tokens()
    body = {"model": "keyed", "prompt": "Hi", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {keyed}"}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        until(lambda: running(cluster) == 1, 5, "the request runs")
    until(lambda: running(cluster) == 0, 1.5, "the request stops")  # one second, plus the time of the check
    assert tokens() - before < 2000


def test_other_engine_paths(cluster: Home, keyed: str) -> None:
    http = httpx.Client(base_url=cluster.url, headers={"authorization": f"Bearer {keyed}"}, timeout=60)
    tokens = http.post("/tokenize", json={"model": "keyed", "prompt": "Hello there"}).json()["tokens"]
    text = http.post("/detokenize", json={"model": "keyed", "tokens": tokens}).json()["prompt"]
    assert "Hello there" in text
    message = http.post(
        "/v1/messages",
        json={"model": "keyed", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]},
        headers={"x-api-key": keyed},
    )
    assert message.status_code == 200 and message.json()["type"] == "message"
    client = openai.OpenAI(api_key=keyed, base_url=f"{cluster.url}/v1", max_retries=0)
    response = client.responses.create(model="keyed", input="Hi", max_output_tokens=4)
    assert response.object == "response"
    with pytest.raises(
        openai.NotFoundError, match=r"keyed does not support /v1/embeddings. Available: .*/v1/chat/completions"
    ):
        client.embeddings.create(model="keyed", input="Hi")
    for path in ("/v1/load_lora_adapter", "/sleep", "/reset_prefix_cache", "/collective_rpc", "/pause", "/v1/nothing"):
        answer = http.post(path, json={"model": "keyed"})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "path_not_found", path
    listed = client.models.retrieve("keyed").model_dump()["llmrun"]
    assert listed["max_model_len"] == 2048 and "/v1/embeddings" not in listed["paths"]
    answer = http.post("/v1/completions", json={"model": "keyed", "prompt": "Hi"}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    client.close()
    http.close()
    log, line = cluster.path / "logs" / "ingress.log", "mine-1 key alice keyed /v1/completions 200"
    until(lambda: line in log.read_text(), 5, "the request appears in the log")


def test_an_ingress_killed_under_load_recovers_and_counts_correctly(cluster: Home, keyed: str) -> None:
    stop, broken, late = threading.Event(), [], []

    def caller() -> None:
        while not stop.is_set():
            try:
                assert ask(cluster, keyed, max_tokens=30).status_code == 200
                late.append(time.monotonic())
            except httpx.TransportError:
                broken.append(time.monotonic())
                time.sleep(0.05)

    with ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(caller) for _ in range(8)]
        try:
            until(lambda: len(late) > 20, 30, "requests succeed under load")
            (ingress,) = titled(cluster, "ray::IngressActor")
            ingress.kill()
            killed = time.monotonic()
            until(lambda: len([moment for moment in late if moment > killed + 0.5]) > 20, 30, "requests succeed again")
        finally:
            stop.set()
    for one in callers:
        one.result()
    assert broken and max(broken) - killed < 10

    def settled() -> bool:
        status = cluster.status("keyed")
        return bool(status["in_flight"] == 0 == status["waiting"])

    until(settled, 10, "no request is counted as in flight or waiting")
    assert ask(cluster, "sk-llmrun-guess").status_code == 401


def test_requests_valid_by_openapi_cause_no_server_errors(cluster: Home, keyed: str) -> None:
    document = schemathesis.openapi.from_dict(httpx.get(f"{cluster.url}/openapi.json").json())
    headers = {"authorization": f"Bearer {keyed}"}
    requests_sent, session = 0, requests.Session()
    for result in document.get_all_operations():
        assert isinstance(result, Ok), result

        @given(case=result.ok().as_strategy(), known_model=booleans())
        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def fuzz(case: Any, known_model: bool) -> None:
            nonlocal requests_sent
            requests_sent += 1
            if known_model and isinstance(case.body, dict):
                case.body["model"] = "keyed"
            answer = case.call(base_url=cluster.url, session=session, headers=headers, timeout=30)
            assert answer.status_code < 500, (case.path, case.body, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], (case.path, case.body, answer.text)

        fuzz()
    session.close()
    assert requests_sent > 100


def test_two_ingresses_share_limits_and_public_hosts_require_keys(tmp_path: Path, tiny_weights: Path) -> None:
    home = Home(tmp_path / "two", free_port(), install(tmp_path / "packages") | {"LLMRUN_FORKSERVER": "0"})
    other = Home(tmp_path / "other", free_port())
    everywhere = ("up", "--host", "0.0.0.0")
    assert "--host 0.0.0.0 requires an API key" in home.fails(*everywhere)
    assert not (home.path / "cluster.json").exists()
    home.ok(*everywhere, "--insecure", LLMRUN_INGRESSES="2")
    try:
        error = other.fails("up", "--port", str(home.port), LLMRUN_INGRESSES="2")
        assert "cannot listen on" in error and not (other.path / "cluster.json").exists()
        text = f"@llm({str(tiny_weights)!r}, engine='stub', cpus=0.2, min_replicas=1)\nclass Keyed: ...\n"
        home.ok("deploy", write_app(tmp_path / "keyed" / "app.py", text))
        key = create(home, "both", "--rpm", "40")

        def statuses(count: int) -> list[int]:
            return [ask(home, key, max_tokens=4).status_code for _ in range(count)]

        counts = Counter(statuses(80))
        # An ingress may not have received the other's counts of the last half second.
        assert 40 <= counts[200] <= 60 and counts[200] + counts[429] == 80
        answered = {
            s.labels["ingress"]: s.value
            for s in metrics(home)
            if s.name == "llmrun_requests_total" and s.labels["status"] == "200" and s.labels["model"] == "keyed"
        }
        assert answered.keys() == {"ingress", "ingress-2"} and sum(answered.values()) == counts[200]
        home.ok("key", "revoke", "both")
        key = create(home, "more")
        ingress, _ = titled(home, "ray::IngressActor")
        ingress.kill()
        broken = 0
        for _ in range(40):
            try:
                assert statuses(1) == [200]
            except httpx.TransportError:  # sent while the ingress died
                broken += 1
        assert broken <= 2
        until(lambda: len(titled(home, "ray::IngressActor")) == 2, 20, "the killed ingress is back")
        home.ok("key", "create", "last")
        home.ok("key", "revoke", "more")
        until(lambda: set(statuses(8)) == {401}, 2, "both ingresses reject the revoked key")
        home.ok("down")
        home.ok(*everywhere)
        assert httpx.get(f"{home.url}/v1/models").status_code == 401
    finally:
        home.ok("down")
