"""API keys, limits, fairness, forms, CORS and metrics of the ingress, on a real port."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict
from prometheus_client.parser import text_string_to_metric_families

from llmrun.identity import digest_of
from llmrun.wire import KeyInfo
from llmrun_runtime.ingress.admission.rate_limits import Limit, Limiter
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.queue.claim import Caller, WaitLimit
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.rate_window import RateWindow
from llmrun_runtime.wire.headers import KEY_HEADER, PROBE_HEADER
from llmrun_runtime.wire.reports import LocalUsage, RemoteUsage
from llmrun_runtime.wire.routing_table import Table
from tests.support.ingress import CHAT, Bench, Engine, bearer, keys, route, running_ingress

TRANSCRIPTIONS = "/v1/audio/transcriptions"


@pytest.fixture
def keyed(bench: Bench, engine: Engine) -> Bench:
    """An ingress with the keys `good`, `old` (expired) and `other` (for another model), and the admin key `root`."""
    expired, other = KeyInfo(name="old", expires=time.time() - 1), KeyInfo(name="other", models=("two",))
    bench.table(route(engine.port), keys=keys(KeyInfo(name="good"), expired, other), admin=digest_of("root"))
    return bench


@pytest.mark.parametrize("options", [{}, bearer("whatever")])
async def test_until_a_key_exists_none_is_required(bench: Bench, engine: Engine, options: dict[str, Any]) -> None:
    bench.table(route(engine.port))
    assert (await bench.post(**options))[0] == 200


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "missing_api_key"),
        (bearer("bad"), "invalid_api_key"),
        (bearer(""), "missing_api_key"),
        ({"headers": {"authorization": "Basic Z29vZA=="}}, "missing_api_key"),
        (bearer("old"), "expired_api_key"),
    ],
)
async def test_a_missing_wrong_or_expired_key_is_rejected(
    keyed: Bench, engine: Engine, options: dict[str, Any], code: str
) -> None:
    status, headers, answer = await keyed.post(**options)
    assert status == 401 and answer["error"]["code"] == code and headers["x-request-id"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("options", "name"),
    [(bearer("good"), "good"), (bearer("root"), "admin"), ({"headers": {"x-api-key": "good"}}, "good")],
)
async def test_a_valid_key_is_accepted_and_its_name_sent_to_the_engine(
    keyed: Bench, engine: Engine, options: dict[str, Any], name: str
) -> None:
    assert (await keyed.post(**options))[0] == 200
    assert [request.headers[KEY_HEADER] for request in engine.requests] == [name]


async def test_a_key_for_other_models_is_rejected(keyed: Bench, engine: Engine) -> None:
    status, _, answer = await keyed.post(**bearer("other"))
    assert (status, answer["error"]["message"]) == (404, "model 'one' not found: no models are available")
    assert not engine.requests


async def test_an_error_does_not_reveal_other_models(keyed: Bench) -> None:
    status, _, answer = await keyed.post({"model": "nobody"}, **bearer("other"))
    assert status == 404 and "no models are available" in answer["error"]["message"]


async def test_models_that_a_key_cannot_access_are_not_listed(keyed: Bench) -> None:
    async with keyed.session.get(keyed.url + "/v1/models", **bearer("other")) as answer:
        assert (await answer.json())["data"] == []


async def test_listing_models_requires_a_key(keyed: Bench) -> None:
    async with keyed.session.get(keyed.url + "/v1/models") as answer:
        assert answer.status == 401


async def test_a_key_is_checked_before_the_body_is_read(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port), keys=keys(KeyInfo(name="good")))
    large = b"x" * 2 * 2**20
    assert [(await bench.post(large, **bearer(key)))[0] for key in ("bad", "good")] == [401, 413]
    assert not engine.requests


@pytest.mark.parametrize("name", ["content-type", "authorization", "x-api-key"])
async def test_a_repeated_header_is_refused(keyed: Bench, engine: Engine, name: str) -> None:
    keyed.table(
        route(engine.port), keys=keys(KeyInfo(name="good")), admin=digest_of("root"), control=engine.serve_http()
    )
    headers = CIMultiDict({"authorization": "Bearer good", "content-type": "application/json", "x-api-key": "good"})
    assert (await keyed.post(headers=headers))[0] == 200
    headers.add(name, "text/plain")
    for path in (CHAT, "/llmrun/v1/plan"):
        status, _, answer = await keyed.post(path=path, headers=headers)
        assert (status, answer["error"]["code"]) == (400, "invalid_header")
        assert f"header {name} must not be repeated" in answer["error"]["message"]
    async with keyed.session.get(keyed.url + "/v1/models", headers=headers) as response:
        assert response.status == 400
    assert len(engine.requests) == 1


async def test_beyond_loopback_a_key_is_always_required(engine: Engine) -> None:
    async with running_ingress(keys_only=True) as bench:
        bench.table(route(engine.port))
        assert (await bench.post())[0] == 401


async def test_clients_cannot_set_internal_headers(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port), keys=keys(KeyInfo(name="good")))
    headers = {"authorization": "Bearer good", KEY_HEADER: "other", PROBE_HEADER: "1"}
    assert (await bench.post(headers=headers))[0] == 200
    assert engine.requests[0].headers.getlist(KEY_HEADER) == ["good"] and PROBE_HEADER not in engine.requests[0].headers


async def test_a_no_wake_key_reaches_only_hot_models(bench: Bench, engine: Engine) -> None:
    all_keys = keys(KeyInfo(name="probe", wake=False))
    bench.table(route(state="cold"), keys=all_keys)
    status, _, answer = await bench.post(**bearer("probe"))
    assert status == 503 and "one is cold, and API key probe cannot wake models" in answer["error"]["message"]
    assert not bench.queue.traffic()
    bench.table(route(engine.port), keys=all_keys)
    pending = asyncio.create_task(bench.post({"model": "one", "hang": True}, **bearer("probe")))
    while not engine.requests:
        await asyncio.sleep(0.01)
    assert not bench.queue.traffic()  # it does not keep a replica running
    assert engine.requests[0].headers[PROBE_HEADER] == "1"
    pending.cancel()


async def test_limits_of_a_key_and_of_a_model(bench: Bench, engine: Engine) -> None:
    all_keys = keys(KeyInfo(name="slow", rpm=2), KeyInfo(name="few", max_in_flight=1), KeyInfo(name="free"))
    bench.table(route(engine.port, rpm=6, max_ongoing=20), keys=all_keys)
    status, headers, _ = await bench.post(**bearer("slow"))
    assert status == 200
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    await bench.post(**bearer("slow"))
    status, headers, answer = await bench.post(**bearer("slow"))
    assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded"
    assert "rate limit reached: key slow is limited to 2 requests per minute (rpm)" in answer["error"]["message"]
    assert 1 <= int(headers["retry-after"]) <= 60 and headers["x-ratelimit-remaining-requests"] == "0"
    hanging = asyncio.create_task(bench.post({"model": "one", "hang": True}, **bearer("few")))
    while len(engine.requests) < 3:
        await asyncio.sleep(0.01)
    status, _, answer = await bench.post(**bearer("few"))
    assert status == 429 and "(max_in_flight)" in answer["error"]["message"]
    hanging.cancel()
    await asyncio.wait_for(engine.client_left.wait(), 5)
    while (await bench.post(**bearer("few")))[0] != 200:
        await asyncio.sleep(0.05)
    assert [(await bench.post(**bearer("free")))[0] for _ in range(3)] == [200, 200, 429]  # the model's own limit
    assert bench.limiter.usage(time.monotonic())["key:slow"] == LocalUsage(2, 0)


@pytest.mark.parametrize(
    ("body", "status"), [(b"{", 400), (b'{"model": "nobody"}', 404), (b"x" * 3000, 413), (b'{"model": "other"}', 404)]
)
async def test_refused_requests_count(engine: Engine, body: bytes, status: int) -> None:
    async with running_ingress(max_body_bytes=2000) as bench:
        slow = KeyInfo(name="slow", rpm=2, models=("one",))
        bench.table(route(engine.port), route(engine.port, name="other"), keys=keys(slow))
        for _ in range(2):
            got, headers, _ = await bench.post(body, **bearer("slow"))
            assert got == status and headers["x-ratelimit-limit-requests"] == "2"
        assert (await bench.post(**bearer("slow")))[0] == 429
        assert not engine.requests


async def test_a_key_above_its_limit_is_refused_before_its_body_is_read(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port), keys=keys(KeyInfo(name="slow", rpm=1), KeyInfo(name="few", max_in_flight=1)))
    await bench.post(**bearer("slow"))
    uploading, rest = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"model": '
        uploading.set()
        await rest.wait()
        yield b'"one"}'

    status, _, answer = await asyncio.wait_for(bench.post(body(), **bearer("slow")), 5)
    assert status == 429 and "(rpm)" in answer["error"]["message"]
    uploading.clear()
    upload = asyncio.create_task(bench.post(body(), **bearer("few")))
    await asyncio.wait_for(uploading.wait(), 5)
    while not bench.limiter.usage(time.monotonic()):
        await asyncio.sleep(0.01)
    status, _, answer = await bench.post(**bearer("few"))
    assert status == 429 and "(max_in_flight)" in answer["error"]["message"]
    rest.set()
    assert (await asyncio.wait_for(upload, 5))[0] == 200


def test_usage_at_other_ingresses_counts() -> None:
    limiter, limit = Limiter(), Limit("key:a", "key a", rpm=5, tpm=100, max_in_flight=2)
    limiter.set_remote({"key:a": RemoteUsage(requests=3)}, 1000.0)
    for now in (1000.0, 1010.0):
        with limiter.acquire([limit], now):
            pass
    with (
        pytest.raises(HTTPError, match=r"limited to 5 requests per minute") as error,
        limiter.acquire([limit], 1020.0),
    ):
        pass
    assert error.value.retry_after == 40  # when the first one is a minute old
    limiter.set_remote({"key:a": RemoteUsage(in_flight=2)}, 1100.0)
    with pytest.raises(HTTPError, match="limited to 2 concurrent requests"), limiter.acquire([limit], 1100.0):
        pass
    limiter.set_remote({"key:a": RemoteUsage(tokens=120, tokens_wait=7.2)}, 1100.0)
    with (
        pytest.raises(HTTPError, match=r"limited to 100 tokens per minute \(tpm\), 120 used") as error,
        limiter.acquire([limit], 1100.0),
    ):
        pass
    assert error.value.retry_after == 8
    assert dict(limiter.headers([limit], 1100.0))[b"x-ratelimit-reset-tokens"] == b"7.2s"
    with limiter.acquire([limit], 1160.0):  # control has been away for a minute: all of it is over
        assert dict(limiter.headers([limit], 1160.0))[b"x-ratelimit-remaining-tokens"] == b"100"
    assert limiter.usage(1300.0) == {}


def test_a_rate_window_drops_amounts_after_a_minute() -> None:
    window = RateWindow()
    for now, amount in ((0.0, 5), (0.9, 1), (30.0, 4)):
        window.add(now, amount)
    assert window.total(59.9) == 10 and window.wait(31.0, 11) == 0
    assert window.wait(31.0, 5) == 29 and window.wait(31.0, 1) == 59
    assert window.total(60.0) == 4 and window.total(90.0) == 0 and window.wait(91.0, 1) == 0


async def test_a_flood_of_one_key_does_not_slow_down_another(bench: Bench, engine: Engine) -> None:
    """The flood keeps 60 requests open, most of them rejected by its limit; the other key sends one at a time."""
    all_keys = keys(KeyInfo(name="flood", max_in_flight=4), KeyInfo(name="calm"))
    bench.table(route(engine.port, max_ongoing=8), keys=all_keys)
    body = {"model": "one", "stall": 0.02}

    async def calm(times: int) -> float:
        latencies = []
        for _ in range(times):
            started = time.monotonic()
            assert (await bench.post(body, **bearer("calm")))[0] == 200
            latencies.append(time.monotonic() - started)
        return statistics.median(latencies)

    async def flood() -> None:
        while True:
            await bench.post(body, **bearer("flood"))
            await asyncio.sleep(0.05)  # a client that retries this soon

    alone = await calm(10)
    floods = [asyncio.create_task(flood()) for _ in range(60)]
    await asyncio.sleep(0.3)
    during_flood = await calm(20)
    for task in floods:
        task.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    assert during_flood < 3 * alone + 0.05, (alone, during_flood)


async def test_the_key_with_the_fewest_requests_in_flight_is_next() -> None:
    queue = RequestQueue(60, lambda: None)
    one = route(1, max_ongoing=3)
    queue.update(Table("e", 1, {"one": one}, {"one": "one"}))
    now = asyncio.get_running_loop().time()
    order: list[str] = []

    async def claim_for(key: str) -> Any:
        claim = await queue.claim("one", WaitLimit(now, now + 60), caller=Caller(key))
        order.append(key)
        return claim

    first = [await claim_for("flood") for _ in range(3)]
    tasks = [asyncio.create_task(claim_for(key)) for key in ("flood", "flood", "flood", "calm", "other")]
    await asyncio.sleep(0)
    for claim in first[:2]:
        queue.release(claim)
    await asyncio.wait(tasks[3:], timeout=1)
    assert order[3:] == ["calm", "other"]
    queue.release(first[2])
    while not all(task.done() for task in tasks):
        for task in [task for task in tasks if task.done() and task.result() not in first]:
            first.append(task.result())
            queue.release(task.result())
        await asyncio.sleep(0)
    assert order[5:] == ["flood"] * 3
    for task in tasks:
        if task.result() not in first:
            queue.release(task.result())
    assert not queue.in_flight.by_model


async def test_a_full_queue_accepts_a_key_below_its_share(bench: Bench) -> None:
    bench.table(route(state="waking", max_queued=4), keys=keys(KeyInfo(name="flood"), KeyInfo(name="calm")))
    flood = [asyncio.create_task(bench.post(**bearer("flood"))) for _ in range(6)]
    async with asyncio.timeout(5):
        while sum(task.done() for task in flood) < 2:
            await asyncio.sleep(0.01)
    assert sorted(task.result()[0] for task in flood if task.done()) == [429, 429]
    calm = asyncio.create_task(bench.post(**bearer("calm")))
    assert (await calm)[0] == 503  # it waited, as the rest of the flood did
    assert [(await task)[0] for task in flood].count(503) == 4


async def test_forms_have_a_model_field(bench: Bench, engine: Engine) -> None:
    paths = frozenset({TRANSCRIPTIONS, CHAT})
    bench.table(route(engine.port, paths=paths), route(name="two", names=("two",)))
    form = aiohttp.FormData({"model": "one", "language": "en"})
    form.add_field("file", b"\x00RIFF" * 400_00, filename="a.wav", content_type="audio/wav")
    async with bench.session.post(bench.url + TRANSCRIPTIONS, data=form) as answer:
        assert answer.status == 200
    assert engine.requests[0].headers["content-type"].startswith("multipart/form-data")
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
        status, _, answer = await bench.post(b"--y\r\nnonsense", path=TRANSCRIPTIONS, headers=headers)
        assert status == 400 and answer["error"]["code"] in ("invalid_form", "missing_model")


async def test_cors_is_off_unless_origins_are_set(engine: Engine) -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with running_ingress() as bench, bench.session.options(bench.url + CHAT, headers=preflight) as answer:
        assert "access-control-allow-origin" not in answer.headers
    async with running_ingress(cors_origins="https://a.example, https://b.example/") as bench:
        bench.table(route(engine.port))
        async with bench.session.options(bench.url + CHAT, headers=preflight) as answer:
            assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
        _, headers, _ = await bench.post(headers={"origin": "https://b.example"})
        assert headers["access-control-allow-origin"] == "https://b.example"
        _, headers, _ = await bench.post(headers={"origin": "https://c.example"})
        assert "access-control-allow-origin" not in headers


async def test_metrics_cover_all_models_and_their_engines(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port), route(name="two", names=("two",), state="cold"), control=engine.serve_http())
    await bench.post()
    await bench.post({"model": "nobody"})
    await bench.post({"model": "two", "refuse": 1}, headers={"X-LLMRun-Max-Wait": "0"})
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
    assert ("vllm:tokens_total", "one", "one", next(iter(bench.queue.table.models["one"].replicas)).id) in samples
    assert samples["llmrun_requests_in_flight", "ingress", "one"] == 0
    assert samples["llmrun_requests_waiting", "ingress", "two"] == 1  # the placeholder for the client that did not wait


async def test_a_path_that_the_engine_lacks_is_rejected_after_the_wake(bench: Bench, engine: Engine) -> None:
    """A cold model accepts all paths of its engine type, a running one those that its engine has reported."""
    embeddings = "/v1/embeddings"
    bench.table(route(state="waking", paths=frozenset({CHAT, embeddings})))
    pending = asyncio.create_task(bench.post(path=embeddings))
    while not bench.queue.traffic():
        await asyncio.sleep(0.01)
    bench.table(route(engine.port))
    status, _, answer = await pending
    assert status == 404 and answer["error"]["message"] == f"one does not support {embeddings}. Available: {CHAT}"
    assert not engine.requests and not bench.queue.in_flight.by_model


async def test_listed_models_have_fields_of_llmrun(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, max_model_len=512))
    async with bench.session.get(bench.url + "/v1/models/org/one") as answer:
        model = json.loads(await answer.read())
    assert model["id"] == "org/one" and model["object"] == "model"
    assert model["llmrun"] == {
        **{"state": "hot", "app": "app", "version": 1, "aliases": ["org/one"]},
        **{"paths": [CHAT], "max_model_len": 512},
    }
