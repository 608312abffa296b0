"""LoRA adapters of a tiny model on a real vLLM, through the command line; their folder changes while it runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.adapters import SMOL, SMOL_LAYERS, TINY, make_adapter
from tests.support.cluster import ENGINE_START_S, SMOLLM2, Home, make_tiny_weights, until, write_app
from tests.support.servers import AWS, commit_of, hub_server, s3_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ADAPTERS, LOADED = 12, 4
CALLERS, REQUESTS = 64, int(os.environ.get("LLMRUN_TEST_REQUESTS", "300"))
PROMPTS = [f"Number {number}: once upon a time" for number in range(10)]
# Required gap between the two likeliest first tokens, in log-probability: batching changes only the last digits.
MARGIN = 0.5


@pytest.fixture(scope="module")
def folder(cluster: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Deploy `based` and return the folder of its adapters a0 to a11. At most four are loaded at once."""
    weights = make_tiny_weights(tmp_path_factory.mktemp("sure") / "tiny-llama", spread=0.5)
    place = tmp_path_factory.mktemp("adapters")
    for number in range(ADAPTERS):
        make_adapter(place / f"a{number}", seed=number, rank=(4, 8, 16)[number % 3])
    lora = f"LoRA({str(place)!r}, max_loaded={LOADED}, refresh=1, canary=True)"
    text = f"@llm({str(weights)!r}, lora={lora}, cpus=0.2, idle_timeout=600)\nclass Based: ...\n"
    app = write_app(tmp_path_factory.mktemp("based") / "based" / "app.py", text)
    cluster.ok("deploy", app)
    yield place
    cluster.ok("delete", "based", "--yes")


def ask(cluster: Home, model: str, prompt: str = PROMPTS[0], **more: Any) -> httpx.Response:
    """Request a greedy completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 2} | more
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=ENGINE_START_S)


def first_token(answer: httpx.Response) -> tuple[str, float]:
    """Return the first token and its lead over the runner-up, in log-probability."""
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    best, second = sorted(choice["logprobs"]["top_logprobs"][0].values(), reverse=True)[:2]
    return choice["text"], best - second


def listed(cluster: Home) -> dict[str, Any]:
    """Return the models that the ingress lists, by ID."""
    return {model["id"]: model for model in httpx.get(f"{cluster.url}/v1/models").json()["data"]}


def adapters(cluster: Home) -> list[dict[str, Any]]:
    """Return the adapters of `stored`."""
    rows: list[dict[str, Any]] = json.loads(cluster.ok("adapter", "list", "stored", "--json"))
    return rows


def message(answer: httpx.Response) -> str:
    """Return the message of an error response."""
    text: str = answer.json()["error"]["message"]
    return text


def test_adapters_are_listed_and_serve_requests(cluster: Home, folder: Path) -> None:
    models = listed(cluster)
    assert models["based:a3"]["parent"] == "based" and sum(name.startswith("based:") for name in models) == ADAPTERS
    answer = ask(cluster, "based:a3", max_tokens=8)
    assert answer.status_code == 200 and answer.json()["model"] == "based:a3"
    assert answer.json()["choices"][0]["text"] != ask(cluster, "based", max_tokens=8).json()["choices"][0]["text"]
    missing = ask(cluster, "based:a33")
    assert missing.status_code == 404 and "Did you mean based:a3" in message(missing)


def test_under_load_each_adapter_gives_the_same_answers_as_alone(cluster: Home, folder: Path) -> None:
    names = ["based", *(f"based:a{number}" for number in range(ADAPTERS))]
    alone = {(name, prompt): first_token(ask(cluster, name, prompt)) for name in names for prompt in PROMPTS}
    sure = [(pair, token) for pair, (token, margin) in alone.items() if margin > MARGIN]
    assert {name for (name, _), _ in sure} == set(names), "each has an answer that it is sure of"
    assert len({token for _, token in sure}) > ADAPTERS / 2
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    sample = random.Random(seed).choices(sure, k=REQUESTS)

    def wrong(item: tuple[tuple[str, str], str]) -> str:
        (name, prompt), expected = item
        token, _ = first_token(ask(cluster, name, prompt))
        return "" if token == expected else f"{name} {prompt!r}: {token!r} instead of {expected!r}"

    with ThreadPoolExecutor(CALLERS) as pool:
        assert [error for error in pool.map(wrong, sample) if error] == []


def test_adapters_are_added_changed_and_removed_without_a_restart(cluster: Home, folder: Path) -> None:
    (engine,) = cluster.engines("based")
    make_adapter(folder / "new", seed=100)
    until(lambda: "based:new" in listed(cluster), 20, "the new adapter is listed")
    before = [ask(cluster, "based:new", prompt, max_tokens=8).json()["choices"][0]["text"] for prompt in PROMPTS]
    make_adapter(folder / "new", seed=101)

    def changed() -> bool:
        answers = [ask(cluster, "based:new", prompt, max_tokens=8) for prompt in PROMPTS]
        return [answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200] != before

    until(changed, 20, "the adapter has changed")
    shutil.rmtree(folder / "new")
    until(lambda: ask(cluster, "based:new").status_code == 404, 20, "the adapter is removed")
    assert "based:new" not in listed(cluster)
    assert cluster.engines("based")[0].pid == engine.pid


def test_invalid_adapters_do_not_affect_other_requests(cluster: Home, folder: Path) -> None:
    make_adapter(folder / "large", seed=1, rank=64)
    make_adapter(folder / "other", seed=1, shapes={name: (96, height) for name, (_, height) in TINY.items()})
    damaged = make_adapter(folder / "damaged", seed=1) / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    make_adapter(folder / "unknown", seed=1, shapes={"no_proj": (128, 128)})
    (make_adapter(folder / "words", seed=1) / "adapter_config.json").write_text("no JSON")
    names = {f"based:{name}" for name in ("large", "other", "damaged", "words", "unknown")}
    until(lambda: names <= listed(cluster).keys(), 20, "the invalid adapters are listed")
    for name, words in {
        "large": "its rank is 64, but the engine was started for at most 16",
        "other": "it is for another base model: model.layers.0.self_attn.o_proj has 96 inputs, expected 128",
        "damaged": "is damaged (it has",
        "unknown": "vLLM cannot load it",
        "words": "cannot read its adapter_config.json",
    }.items():
        answer = ask(cluster, f"based:{name}")
        assert answer.status_code == 400 and words in message(answer), answer.text
        assert ask(cluster, "based:a1").status_code == 200 == ask(cluster, "based").status_code
        shutil.rmtree(folder / name)


def test_adapters_from_s3_and_while_the_store_is_unavailable(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    for number in range(3):
        make_adapter(tmp_path / "buckets" / "acme" / "adapters" / f"b{number}", seed=number)
    with s3_server(tmp_path / "buckets") as server:
        lora = f"LoRA(Weights('s3://acme/adapters', endpoint_url={server.url!r}), max_loaded=2, refresh=1)"
        more = f"cpus=0.2, idle_timeout=600, env={AWS!r}"
        text = f"from llmrun import Weights\n\n@llm({str(tiny_weights)!r}, lora={lora}, {more})\nclass Stored: ...\n"
        cluster.ok("deploy", write_app(tmp_path / "stored" / "app.py", text))
        assert ask(cluster, "stored:b0").status_code == 200
        rows = until(lambda: (rows := adapters(cluster)) and rows[0]["loaded_on"] and rows, 5, "b0 is loaded")
        assert [(row["name"], bool(row["loaded_on"])) for row in rows] == [("b0", True), ("b1", False), ("b2", False)]
        assert [row["rank"] for row in rows] == [8, 8, 8]
        new = make_adapter(tmp_path / "new", seed=9)
        assert "stored:b3 is ready" in cluster.ok("adapter", "push", new, "stored:b3")
        assert {row["name"] for row in adapters(cluster)} == {"b0", "b1", "b2", "b3"}
        assert ask(cluster, "stored:b0").status_code == 200, "at most two are loaded: b0 is one again"
        until(lambda: time.time() - adapters(cluster)[0]["last_used"] < 60, 10, "the last use is recorded")
        assert adapters(cluster)[1]["last_used"] == 0
        assert "s3://acme/adapters/b1" in cluster.ok("adapter", "list", "stored")
    time.sleep(3)  # long enough for a few refreshes to fail
    assert ask(cluster, "stored:b0").status_code == 200 and "stored:b2" in listed(cluster)
    away = ask(cluster, "stored:b1")
    assert away.status_code == 503 and away.headers["retry-after"] and "stored" in message(away)
    assert ask(cluster, "stored:b0").status_code == 200
    cluster.ok("delete", "stored", "--yes")
    assert "model 'stored' not found" in cluster.fails("adapter", "list", "stored")


def test_a_pushed_adapter_serves_requests(cluster: Home, folder: Path, tmp_path: Path) -> None:
    # Long enough to fill whole blocks of the engine's prefix cache.
    long = [prompt + " ".join(PROMPTS * 3) for prompt in PROMPTS]
    new = make_adapter(tmp_path / "new", seed=50)
    done = cluster.ok("adapter", "push", new, "based:pushed")
    assert f"pushed based:pushed to {folder}/pushed" in done and "based:pushed is ready" in done
    first = [ask(cluster, "based:pushed", prompt, max_tokens=8).json()["choices"][0]["text"] for prompt in long]
    make_adapter(new, seed=51)
    cluster.ok("adapter", "push", new, "based:pushed")
    cluster.ok("adapter", "push", new, "based:fresh")
    again = [ask(cluster, "based:pushed", prompt, max_tokens=8).json()["choices"][0]["text"] for prompt in long]
    fresh = [ask(cluster, "based:fresh", prompt, max_tokens=8).json()["choices"][0]["text"] for prompt in long]
    assert first != again == fresh
    assert sorted(path.name for path in (folder / "pushed").iterdir()) == sorted(path.name for path in new.iterdir())
    assert not list((cluster.path / "pushes").iterdir())
    make_adapter(tmp_path / "large", seed=1, rank=64)
    other = make_adapter(tmp_path / "other", seed=1, shapes={name: (96, height) for name, (_, height) in TINY.items()})
    (make_adapter(tmp_path / "words", seed=1) / "adapter_config.json").write_text("no JSON")
    for place, name, words in (
        (tmp_path, "based:x", "adapter_config.json not found"),
        (new, "based", "must be MODEL:NAME"),
        (new, "based:a b", "an adapter's name may contain only letters"),
        (new, "nobody:x", "model 'nobody' not found"),
        (tmp_path / "large", "based:x", "x has rank 64, but based allows 16 at most"),
        (tmp_path / "words", "based:x", "cannot read adapter_config.json of x"),
        (other, "based:other", "it is for another base model"),
    ):
        assert words in cluster.fails("adapter", "push", place, name)
    assert not (folder / "x").exists()
    for name in ("pushed", "other", "fresh"):
        shutil.rmtree(folder / name)


def test_adapter_revisions_and_the_canary(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    old, new = (make_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new")))
    with hub_server() as hub:
        hub.repos["acme/legal"], hub.branches["acme/legal"] = new, {"v1": old}
        lora = "LoRA(adapters={'legal': Weights('acme/legal', endpoint_url=%r)}, max_loaded=1, refresh=1, canary=True)"
        text = f"@llm({str(tiny_weights)!r}, lora={lora % hub.url}, cpus=0.2, idle_timeout=600)\nclass Revised: ...\n"
        cluster.ok("deploy", write_app(tmp_path / "revised" / "app.py", "from llmrun import Weights\n\n" + text))

        def texts(model: str) -> list[str]:
            answers = [ask(cluster, model, prompt, max_tokens=8) for prompt in PROMPTS]
            return [answer.json()["choices"][0]["text"] for answer in answers]

        now, before = texts("revised:legal"), texts("revised:legal@v1")
        assert now != before == texts(f"revised:legal@{commit_of(old)}") and texts("revised:legal@main") == now
        wrong = ask(cluster, "revised:legal@v9")
        assert wrong.status_code == 404 and "'v9' is not a branch or tag of acme/legal" in message(wrong)
        assert [name for name in listed(cluster) if name.startswith("revised:")] == ["revised:legal"]
        rows = json.loads(cluster.ok("usage", "--by", "adapter", "--json"))
        assert not any("@" in row["adapter"] for row in rows)
        for first in (cluster.path / "cache" / "engines" / "revised").glob("*/canary/*.json"):
            kept = json.loads(first.read_text())
            first.write_text(json.dumps([{token: value - 1 for token, value in place.items()} for place in kept]))
        damaged = ask(cluster, "revised:legal@v1")
        assert damaged.status_code == 503 and "its answers differ from the first load of the same files" in message(
            damaged
        )
        assert ask(cluster, "revised").status_code == 200
    cluster.ok("delete", "revised", "--yes")


def test_prompt_log_probabilities_do_not_break_concurrent_requests(cluster: Home, folder: Path) -> None:
    (engine,) = cluster.engines("based")

    def status(number: int) -> int:
        more: dict[str, Any] = {"prompt_logprobs": 1} if number % 4 == 0 else {"echo": True} if number % 4 == 1 else {}
        model = ("based", "based:a1", "based:a2")[number % 3]
        return ask(cluster, model, PROMPTS[number % 10], max_tokens=4, **more).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(status, range(96))) == {200}
    assert cluster.engines("based")[0].pid == engine.pid


def test_adapters_change_the_answers_of_smollm2(cluster: Home, tmp_path: Path) -> None:
    for seed, rank in enumerate((4, 32)):
        make_adapter(tmp_path / "small" / f"r{rank}", seed, rank, scale=1, shapes=SMOL, layers=SMOL_LAYERS)
    lora = f"LoRA({str(tmp_path / 'small')!r}, max_loaded=2, canary=True)"
    text = f"@llm({str(SMOLLM2)!r}, lora={lora}, cpus=0.2, idle_timeout=600)\nclass Smol: ...\n"
    cluster.ok("deploy", write_app(tmp_path / "smol" / "app.py", text))
    rows = json.loads(cluster.ok("adapter", "list", "smol", "--json"))
    assert [(row["name"], row["rank"]) for row in rows] == [("r32", 32), ("r4", 4)]
    answers = [ask(cluster, model, max_tokens=8) for model in ("smol", "smol:r4", "smol:r32", "smol")]
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert len(set(texts)) == 3 and texts[0] == texts[3]
    cluster.ok("delete", "smol", "--yes")


def test_a_deploy_rejects_an_invalid_lora_option(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    for lora, words in (
        ("'./nowhere'", "nowhere: folder not found"),
        (f"{{'sql': {str(tiny_weights)!r}}}", f"lora='sql': no adapter found in {tiny_weights}"),
        ("LoRA('./x', max_rank=7)", "max_rank=7: must be one of 1, 8"),
        ("7", "lora=7: must be a place"),
    ):
        text = f"@llm({str(tiny_weights)!r}, lora={lora}, cpus=0.2)\nclass Wrong: ...\n"
        assert words in cluster.fails("deploy", write_app(tmp_path / "wrong" / "app.py", text))


def test_a_key_can_be_restricted_to_one_adapter(cluster: Home, folder: Path) -> None:
    assert "adapter 'based:a77' not found" in cluster.fails("key", "create", "few", "--model", "based:a77")
    key = cluster.run("key", "create", "few", "--model", "based:a1").stdout.strip()
    headers = {"authorization": f"Bearer {key}"}
    body = {"prompt": PROMPTS[0], "max_tokens": 1}

    def status(model: str) -> int:
        request = {"model": model} | body
        return httpx.post(f"{cluster.url}/v1/completions", json=request, headers=headers, timeout=60).status_code

    try:
        until(lambda: status("based:a1") == 200, 10, "the key is accepted")
        assert status("based:a2") == 404 == status("based")
        seen = httpx.get(f"{cluster.url}/v1/models", headers=headers).json()["data"]
        assert [model["id"] for model in seen] == ["based:a1"]
    finally:
        cluster.ok("key", "revoke", "few")
    until(lambda: ask(cluster, "based").status_code == 200, 10, "requests without a key are accepted again")


def test_usage_is_grouped_by_adapter(cluster: Home, folder: Path) -> None:
    ask(cluster, "based:a5")

    def used() -> bool:
        rows = json.loads(cluster.ok("usage", "--by", "adapter", "--json"))
        names = {row["adapter"] for row in rows}
        return "based:a5" in names and "based:new" in names and not any("@" in name for name in names)

    until(used, 10, "the usage is recorded")


def test_changing_the_named_adapters_needs_no_restart(
    cluster: Home, folder: Path, tmp_path: Path, tiny_weights: Path
) -> None:
    def app(lora: dict[str, str]) -> Path:
        text = f"@llm({str(tiny_weights)!r}, cpus=0.1, idle_timeout=600, lora={lora})\nclass Named: ...\n"
        return write_app(tmp_path / "named" / "app.py", text)

    cluster.ok("deploy", app({"legal": str(folder / "a0")}))
    legal = ask(cluster, "named:legal", max_tokens=8).json()["choices"][0]["text"]
    (engine,) = cluster.engines("named")
    assert ask(cluster, "named:sql").status_code == 404
    output = cluster.ok("deploy", app({"legal": str(folder / "a0"), "sql": str(folder / "a1")}))
    assert "~ named  (no restart)" in output
    until(lambda: "named:sql" in listed(cluster), 10, "the new adapter is listed")
    assert ask(cluster, "named:sql", max_tokens=8).json()["choices"][0]["text"] != legal
    assert ask(cluster, "named:legal", max_tokens=8).json()["choices"][0]["text"] == legal
    assert "~ named  (no restart)" in cluster.ok("deploy", app({"sql": str(folder / "a1")}))
    until(lambda: ask(cluster, "named:legal").status_code == 404, 10, "the old adapter is removed")
    assert cluster.engines("named")[0].pid == engine.pid
    cluster.ok("delete", "named", "--yes")
