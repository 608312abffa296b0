"""Who comes in, how often, and in whose turn: keys, limits, fairness, forms, CORS and metrics, on a real port."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmrun.wire import KeyInfo
from llmrun_runtime.ingress.admission.rate_limits import Limit, Limiter
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.queue.request_queue import Caller, RequestQueue
from llmrun_runtime.rate_window import RateWindow
from llmrun_runtime.wire.headers import KEY_HEADER, PROBE_HEADER
from llmrun_runtime.wire.reports import LocalUsage, RemoteUsage
from llmrun_runtime.wire.routing_table import Table, digest_of
from tests.support.ingress import CHAT, Bench, Engine, an_ingress, bearer, keys, route

TRANSCRIPTIONS = "/v1/audio/transcriptions"


async def test_without_keys_everybody_comes_in_and_with_one_only_who_has_it(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    assert (await bench.ask())[0] == 200 and (await bench.ask(**bearer("whatever")))[0] == 200
    known = keys(
        KeyInfo(name="good"), KeyInfo(name="old", expires=time.time() - 1), KeyInfo(name="other", models=("two",))
    )
    bench.table(route(engine.port), keys=known, admin=digest_of("root"))
    for more, code in (
        ({}, "missing_api_key"),
        (bearer("bad"), "invalid_api_key"),
        (bearer(""), "missing_api_key"),
        ({"headers": {"authorization": "Basic Z29vZA=="}}, "missing_api_key"),
        (bearer("old"), "expired_api_key"),
    ):
        status, headers, answer = await bench.ask(**more)
        assert status == 401 and answer["error"]["code"] == code and headers["x-request-id"]
    status, _, answer = await bench.ask(**bearer("other"))
    assert status == 403 and "the key other is not for one: it is for two" in answer["error"]["message"]
    status, _, answer = await bench.ask({"model": "nobody"}, **bearer("other"))
    assert status == 404 and "nothing is deployed" in answer["error"]["message"]  # of the others it does not hear
    for more in (bearer("good"), bearer("root"), {"headers": {"x-api-key": "good"}}):
        assert (await bench.ask(**more))[0] == 200
    async with bench.session.get(bench.url + "/v1/models", **bearer("other")) as answer:
        assert (await answer.json())["data"] == []
    async with bench.session.get(bench.url + "/v1/models") as answer:
        assert answer.status == 401
    assert [request.headers[KEY_HEADER] for request in engine.asked[2:]] == ["good", "admin", "good"]


async def test_beyond_loopback_there_is_no_way_in_without_a_key(engine: Engine) -> None:
    async with an_ingress(keys_only=True) as bench:
        bench.table(route(engine.port))
        assert (await bench.ask())[0] == 401


async def test_callers_cannot_say_who_they_are_themselves(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port), keys=keys(KeyInfo(name="good")))
    headers = {"authorization": "Bearer good", KEY_HEADER: "other", PROBE_HEADER: "1"}
    assert (await bench.ask(headers=headers))[0] == 200
    assert engine.asked[0].headers.getlist(KEY_HEADER) == ["good"] and PROBE_HEADER not in engine.asked[0].headers


async def test_a_key_that_does_not_wake_reaches_hot_models_only(bench: Bench, engine: Engine) -> None:
    known = keys(KeyInfo(name="probe", wake=False))
    bench.table(route(state="cold"), keys=known)
    status, _, answer = await bench.ask(**bearer("probe"))
    assert status == 503 and "one is cold, and the key probe does not wake models" in answer["error"]["message"]
    assert not bench.waiting.traffic()
    bench.table(route(engine.port), keys=known)
    asked = asyncio.create_task(bench.ask({"model": "one", "hang": True}, **bearer("probe")))
    while not engine.asked:
        await asyncio.sleep(0.01)
    assert not bench.waiting.traffic()  # nobody whom a replica would stay up for
    assert engine.asked[0].headers[PROBE_HEADER] == "1"
    asked.cancel()


async def test_limits_of_a_key_and_of_a_model(bench: Bench, engine: Engine) -> None:
    known = keys(KeyInfo(name="slow", rpm=2), KeyInfo(name="few", max_in_flight=1), KeyInfo(name="free"))
    bench.table(route(engine.port, rpm=6, max_ongoing=20), keys=known)
    status, headers, _ = await bench.ask(**bearer("slow"))
    assert status == 200
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    await bench.ask(**bearer("slow"))
    status, headers, answer = await bench.ask(**bearer("slow"))
    assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded"
    assert "the key slow has had 2 requests in the last minute (rpm)" in answer["error"]["message"]
    assert 1 <= int(headers["retry-after"]) <= 60 and headers["x-ratelimit-remaining-requests"] == "0"
    hanging = asyncio.create_task(bench.ask({"model": "one", "hang": True}, **bearer("few")))
    while len(engine.asked) < 3:
        await asyncio.sleep(0.01)
    status, _, answer = await bench.ask(**bearer("few"))
    assert status == 429 and "(max_in_flight)" in answer["error"]["message"]
    hanging.cancel()
    await asyncio.wait_for(engine.left.wait(), 5)
    while (await bench.ask(**bearer("few")))[0] != 200:
        await asyncio.sleep(0.05)
    assert [(await bench.ask(**bearer("free")))[0] for _ in range(3)] == [200, 200, 429]  # the model's own
    assert bench.limiter.spent(time.time())["key:slow"] == LocalUsage(2, 0)


def test_what_was_asked_elsewhere_counts() -> None:
    limiter, limit = Limiter(), Limit("key:a", "the key a", rpm=5, tpm=100, max_in_flight=2)
    limiter.elsewhere = {"key:a": RemoteUsage(requests=3)}
    for now in (1000.0, 1010.0):
        with limiter.entered([limit], now):
            pass
    with pytest.raises(HTTPError, match=r"5 requests in the last minute") as refused, limiter.entered([limit], 1020.0):
        pass
    assert refused.value.retry_after == 40  # the first one is a minute old then
    limiter.elsewhere = {"key:a": RemoteUsage(in_flight=2)}
    with pytest.raises(HTTPError, match="2 requests at once"), limiter.entered([limit], 1100.0):
        pass
    limiter.elsewhere = {"key:a": RemoteUsage(tokens=120, tokens_wait=7.2)}
    with pytest.raises(HTTPError, match=r"120 of 100 tokens") as refused, limiter.entered([limit], 1100.0):
        pass
    assert refused.value.retry_after == 8
    assert dict(limiter.headers([limit], 1100.0))[b"x-ratelimit-reset-tokens"] == b"7.2s"
    assert limiter.spent(1100.0) == {}


def test_a_window_forgets_after_a_minute() -> None:
    window = RateWindow()
    for now, amount in ((0.0, 5), (0.9, 1), (30.0, 4)):
        window.add(now, amount)
    assert window.total(59.9) == 10 and window.wait(31.0, 11) == 0
    assert window.wait(31.0, 5) == 29 and window.wait(31.0, 1) == 59
    assert window.total(60.0) == 4 and window.total(90.0) == 0 and window.wait(91.0, 1) == 0


async def test_a_flood_of_one_key_leaves_anothers_latency_alone(bench: Bench, engine: Engine) -> None:
    """The flood keeps 60 requests going, of which its limit refuses most; the other asks one after the other."""
    known = keys(KeyInfo(name="flood", max_in_flight=4), KeyInfo(name="calm"))
    bench.table(route(engine.port, max_ongoing=8), keys=known)
    body = {"model": "one", "stall": 0.02}

    async def calm(times: int) -> float:
        found = []
        for _ in range(times):
            begun = time.monotonic()
            assert (await bench.ask(body, **bearer("calm")))[0] == 200
            found.append(time.monotonic() - begun)
        return statistics.median(found)

    async def flood() -> None:
        while True:
            await bench.ask(body, **bearer("flood"))
            await asyncio.sleep(0.05)  # a client that waits so little before it tries again

    alone = await calm(20)
    floods = [asyncio.create_task(flood()) for _ in range(60)]
    await asyncio.sleep(0.3)
    beside = await calm(40)
    for task in floods:
        task.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    assert beside < 3 * alone + 0.05, (alone, beside)


async def test_who_has_fewest_in_flight_is_next() -> None:
    waiting = RequestQueue(60, lambda: None)
    one = route(1, max_ongoing=3)
    waiting.update(Table("e", 1, {"one": one}, {"one": "one"}))
    late = asyncio.get_running_loop().time() + 60
    order: list[str] = []

    async def ask(key: str) -> Any:
        claim = await waiting.claim("one", late, caller=Caller(key))
        order.append(key)
        return claim

    first = [await ask("flood") for _ in range(3)]
    tasks = [asyncio.create_task(ask(key)) for key in ("flood", "flood", "flood", "calm", "other")]
    await asyncio.sleep(0)
    for claim in first[:2]:
        waiting.release(claim)
    await asyncio.wait(tasks[3:], timeout=1)
    assert order[3:] == ["calm", "other"]
    waiting.release(first[2])
    while not all(task.done() for task in tasks):
        for task in [task for task in tasks if task.done() and task.result() not in first]:
            first.append(task.result())
            waiting.release(task.result())
        await asyncio.sleep(0)
    assert order[5:] == ["flood"] * 3
    for task in tasks:
        if task.result() not in first:
            waiting.release(task.result())
    assert not waiting.traffic()


async def test_a_full_queue_has_room_for_a_key_that_has_not_had_its_share(bench: Bench) -> None:
    bench.table(route(state="waking", max_queued=4), keys=keys(KeyInfo(name="flood"), KeyInfo(name="calm")))
    flood = [asyncio.create_task(bench.ask(**bearer("flood"))) for _ in range(6)]
    await asyncio.sleep(0.5)
    assert sorted(task.result()[0] for task in flood if task.done()) == [429, 429]
    calm = asyncio.create_task(bench.ask(**bearer("calm")))
    assert (await calm)[0] == 503  # it waited, as the rest of the flood did
    assert [(await task)[0] for task in flood].count(503) == 4


async def test_forms_have_their_model_as_a_field(bench: Bench, engine: Engine) -> None:
    paths = frozenset({TRANSCRIPTIONS, CHAT})
    bench.table(route(engine.port, paths=paths), route(name="two", names=("two",)))
    form = aiohttp.FormData({"model": "one", "language": "en"})
    form.add_field("file", b"\x00RIFF" * 400_00, filename="a.wav", content_type="audio/wav")
    async with bench.session.post(bench.url + TRANSCRIPTIONS, data=form) as answer:
        assert answer.status == 200
    assert engine.asked[0].headers["content-type"].startswith("multipart/form-data")
    sent: list[tuple[Any, int, str]] = [
        ({"language": "en"}, 400, "missing_model"),
        ({"model": "two"}, 404, "path_not_found"),
        ({"model": "nobody"}, 404, "model_not_found"),
    ]
    for fields, status, code in sent:
        form = aiohttp.FormData(fields)
        form.add_field("file", b"x", filename="a.wav")
        async with bench.session.post(bench.url + TRANSCRIPTIONS, data=form) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (status, code)
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        headers = {"content-type": kind}
        status, _, answer = await bench.ask(b"--y\r\nnonsense", path=TRANSCRIPTIONS, headers=headers)
        assert status == 400 and answer["error"]["code"] in ("invalid_form", "missing_model")


async def test_pages_of_other_origins_come_in_only_where_that_is_set(engine: Engine) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with an_ingress() as bench, bench.session.options(bench.url + CHAT, headers=asked) as answer:
        assert "access-control-allow-origin" not in answer.headers
    async with an_ingress(cors_origins="https://a.example, https://b.example/") as bench:
        bench.table(route(engine.port))
        async with bench.session.options(bench.url + CHAT, headers=asked) as answer:
            assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
        _, headers, _ = await bench.ask(headers={"origin": "https://b.example"})
        assert headers["access-control-allow-origin"] == "https://b.example"
        _, headers, _ = await bench.ask(headers={"origin": "https://c.example"})
        assert "access-control-allow-origin" not in headers


async def test_metrics_are_of_all_models_and_their_engines(bench: Bench, engine: Engine) -> None:
    bench.table(
        route(engine.port), route(name="two", names=("two",), state="cold"), control=("127.0.0.1", engine.http_port)
    )
    await bench.ask()
    await bench.ask({"model": "nobody"})
    await bench.ask({"model": "two", "refuse": 1}, headers={"X-LLMRun-Max-Wait": "0"})
    async with bench.session.get(bench.url + "/metrics") as answer:
        assert answer.status == 200 and answer.content_type == "text/plain"
        text = await answer.text()
    samples = {
        (s.name, *sorted(filter(None, s.labels.values()))): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }
    assert samples["llmrun_requests_total", "200", "ingress", "one"] == 1
    assert samples["llmrun_requests_total", "503", "ingress", "two"] == 1
    assert samples["llmrun_requests_total", "404", "ingress"] == 1
    assert samples["llmrun_time_to_first_byte_seconds_count", "ingress", "one"] == 1
    assert ("vllm:tokens_total", "one", "one", next(iter(bench.waiting.table.models["one"].replicas)).id) in samples
    assert samples["llmrun_requests_in_flight", "ingress", "one"] == 0
    assert samples["llmrun_requests_waiting", "ingress", "two"] == 1  # who did not want to wait has a stand-in


async def test_a_path_that_the_engine_turns_out_to_lack(bench: Bench, engine: Engine) -> None:
    """Cold, a model has all its engine's paths; awake, those that it has said."""
    embeddings = "/v1/embeddings"
    bench.table(route(state="waking", paths=frozenset({CHAT, embeddings})))
    asked = asyncio.create_task(bench.ask(path=embeddings))
    while not bench.waiting.traffic():
        await asyncio.sleep(0.01)
    bench.table(route(engine.port))
    status, _, answer = await asked
    assert status == 404 and answer["error"]["message"] == f"one has no {embeddings}: it has {CHAT}"
    assert not engine.asked and not bench.waiting.traffic()


async def test_what_is_listed_says_what_llmrun_knows(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, max_model_len=512))
    async with bench.session.get(bench.url + "/v1/models/org/one") as answer:
        found = json.loads(await answer.read())
    assert found["id"] == "org/one" and found["object"] == "model"
    assert found["llmrun"] == {
        **{"state": "hot", "app": "app", "version": 1, "aliases": ["org/one"]},
        **{"paths": [CHAT], "max_model_len": 512},
    }
