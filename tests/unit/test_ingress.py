"""The ingress on a real port, in front of a fake engine that fails on request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from llmrun.identity import CHALLENGE_HEADER, PROOF_HEADER, digest_of, is_proof
from llmrun_runtime import http
from llmrun_runtime.ingress.admission.request import parse_request
from llmrun_runtime.ingress.queue.keepalive import KeepaliveTiming
from llmrun_runtime.ingress.routing import choose
from llmrun_runtime.wire.headers import CLIENT_HEADER, TOKEN_HEADER
from llmrun_runtime.wire.reports import Traffic
from tests.support.ingress import CHAT, CHUNKS, Bench, Engine, route, running_ingress


async def test_streams_pass_through_byte_for_byte(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    body = b'{ "model" : "org/one", "odd":  1e3 }'
    headers = {"authorization": "Bearer mine", "x-request-id": "abc", TOKEN_HEADER: "forged", "x-other": "kept"}
    status, response_headers, raw = await bench.post(body, CHAT + "?a=b%20c", headers=headers)
    assert (status, raw) == (200, b"".join(CHUNKS))
    assert (response_headers["x-engine"], response_headers["x-request-id"]) == ("yes", "abc")
    (request,) = engine.requests
    assert await request.body() == body and request.url.query == "a=b%20c"
    assert request.headers[TOKEN_HEADER] == f"t{engine.port}" and request.headers["x-other"] == "kept"
    assert "authorization" not in request.headers and request.headers["x-request-id"] == "abc"


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        (b"{nonsense", 400, "invalid_json", "not valid JSON"),
        (b"\xff\xfe\x00", 400, "invalid_json", "not valid JSON"),
        (b"[" * 100_000, 400, "invalid_json", "not valid JSON"),
        (b"[1]", 400, "invalid_json", "must be a JSON object, not list"),
        (b'{"messages": []}', 400, "missing_model", "'model' is required"),
        (b'{"model": "one", "x": {"model": 1}, "model": "two"}', 400, "duplicate_key", "duplicate key 'model'"),
        (b'{"model": "one", "stream": true, "stream": false}', 400, "duplicate_key", "duplicate key 'stream'"),
        (b'{"model": "one", "mod\\u0065l": "two"}', 400, "duplicate_key", "duplicate key 'model'"),
        (b'{"model": 7}', 400, "invalid_model", "must be a string, not int"),
        (b'{"model": "ona"}', 404, "model_not_found", "Did you mean 'one'? Available: one, org/one"),
        (b'{"model": "one", "x": "' + b"y" * 2**20 + b'"}', 413, "body_too_large", "larger than 1 MiB"),
    ],
)
async def test_invalid_bodies_are_rejected(
    bench: Bench, engine: Engine, body: bytes, status: int, code: str, words: str
) -> None:
    bench.table(route(engine.port))
    actual, headers, answer = await bench.post(body)
    assert (actual, answer["error"]["code"], answer["error"]["type"]) == (status, code, "invalid_request_error")
    assert words in answer["error"]["message"] and headers["x-request-id"]
    assert engine.requests == []


async def test_a_body_of_unknown_length_is_rejected_at_the_limit(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 2**16

    async with bench.session.post(
        bench.url + CHAT, data=endless(), headers={"content-type": "application/json"}
    ) as answer:
        assert answer.status == 413


async def test_nested_model_keys_are_ignored(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    assert (await bench.post(b'{"model": "one", "x": [{"model": 1}, {"model": 2, "model": 3}]}'))[0] == 200


async def test_unknown_paths_and_methods_are_rejected(bench: Bench, engine: Engine) -> None:
    assert "no models are available" in (await bench.post())[2]["error"]["message"]
    assert (await bench.post(b"{nonsense"))[0] == 400
    bench.table(route(engine.port), route(engine.port, name="two", names=("two",), paths=frozenset({"/v1/embeddings"})))
    for path in ("/v1", "/v1/load_lora_adapter", "/sleep", "/load"):
        status, _, answer = await bench.post(path=path)
        assert (status, answer["error"]["code"]) == (404, "path_not_found")
    status, _, answer = await bench.post({"model": "two"})
    assert status == 404 and answer["error"]["message"] == f"two does not support {CHAT}. Available: /v1/embeddings"
    async with bench.session.get(bench.url + CHAT) as answer:
        assert answer.status == 405
    assert (await bench.post(path="/v1/models"))[0] == 405
    assert engine.requests == []


async def test_models_are_listed_from_the_routing_table(bench: Bench) -> None:
    bench.table(route(state="cold"))
    async with bench.session.get(bench.url + "/v1/models") as answer:
        listed, alias = (await answer.json())["data"]
    assert listed["id"] == "one" and listed["created"] == 7 and listed["llmrun"]["state"] == "cold"
    assert alias == listed | {"id": "org/one"}, "a client chooses among the names that are listed"
    async with bench.session.get(bench.url + "/v1/models/org/one") as answer:
        assert (await answer.json())["id"] == "org/one"
    async with bench.session.get(bench.url + "/v1/models/nobody") as answer:
        assert (await answer.json())["error"]["param"] == "model"


async def test_a_request_for_a_cold_model_waits_for_a_replica(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="cold"))
    pending = asyncio.create_task(bench.post())
    while not bench.queue.traffic():
        await asyncio.sleep(0.01)
    assert bench.queue.traffic()["one"].waiting == 1
    bench.table(route(engine.port))
    assert (await pending)[0] == 200
    assert bench.idle


async def test_a_failed_start_fails_waiting_requests(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="cold", failures=1, cause="an older one"))
    pending = asyncio.create_task(bench.post())
    while not bench.queue.traffic():
        await asyncio.sleep(0.01)
    bench.table(route(state="cold", failures=2, cause="out of memory"))
    status, headers, answer = await pending
    assert status == 503 and answer["error"]["message"] == "one failed to start: out of memory"
    assert int(headers["retry-after"]) > 0
    bench.table(route(state="failed", failures=3, cause="out of memory", paused=True))
    assert (await bench.post())[2]["error"]["code"] == "model_failed"


async def test_a_wait_that_times_out_reports_the_cause(bench: Bench) -> None:
    bench.table(route(state="waking", cause="not enough capacity"))
    status, _, answer = await bench.post()
    assert (status, answer["error"]["code"]) == (503, "model_not_ready")
    assert answer["error"]["message"] == (
        "timed out after 1.5 s while one was starting (LLMRUN_WAKE_TIMEOUT): not enough capacity"
    )
    assert bench.idle


async def test_deleting_a_model_fails_waiting_requests(bench: Bench) -> None:
    bench.table(route(state="cold"))
    pending = asyncio.create_task(bench.post())
    while not bench.queue.traffic():
        await asyncio.sleep(0.01)
    bench.table()
    assert (await pending)[0] == 404


async def test_an_unreachable_replica_is_replaced_by_another(bench: Bench, engine: Engine) -> None:
    closed = http.bind("127.0.0.1", 0)
    port = closed.getsockname()[1]
    closed.close()
    bench.table(route(port, engine.port))
    assert (await bench.post())[0] == 200


async def test_a_refused_connection_is_retried_until_the_deadline(bench: Bench, engine: Engine) -> None:
    late = http.bind("127.0.0.1", 0)
    port = late.getsockname()[1]
    late.close()
    bench.table(route(port))
    pending = asyncio.create_task(bench.post())
    while not bench.queue.traffic():
        await asyncio.sleep(0.01)
    bench.table(route(engine.port))
    assert (await pending)[0] == 200
    bench.table(route(port))
    status, _, answer = await bench.post()
    assert (
        status == 503 and "timed out after 1.5 s while waiting for a free replica of one" in answer["error"]["message"]
    )


async def test_an_interrupted_stream_ends_with_an_error_event(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    status, _, answer = await bench.post({"model": "one", "die_late": True})
    *events, error = answer.decode(errors="replace").strip().split("\n\n")
    assert status == 200 and events[0] == "data: {}" and "data: [DONE]" not in events
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "stream_broken_off"


async def test_an_engine_error_does_not_affect_other_requests(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    other = await bench.session.post(bench.url + CHAT, json={"model": "one", "hang": True})
    status, _, answer = await bench.post({"model": "one", "fail": True})
    assert status == 200 and b"stream_broken_off" in answer
    assert not engine.client_left.is_set() and await other.content.readany() == CHUNKS[0]
    other.close()


async def test_headers_that_are_too_large_are_rejected(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    other = await bench.session.post(bench.url + CHAT, json={"model": "one", "hang": True})
    status, _, answer = await bench.post(headers={"x-large": "x" * 300_000})
    assert (status, answer["error"]["code"]) == (431, "headers_too_large")
    assert not engine.client_left.is_set()
    other.close()


async def test_configured_timeouts_are_enforced(engine: Engine) -> None:
    async with running_ingress(first_byte_timeout=0.3, idle_stream_timeout=0.6, request_timeout=1) as bench:
        bench.table(route(engine.port))
        status, _, answer = await bench.post({"model": "one", "stall": 5})
        assert status == 504 and "LLMRUN_FIRST_BYTE_TIMEOUT" in answer["error"]["message"]
        status, _, events = await bench.post({"model": "one", "hang": True})
        assert status == 200 and b"LLMRUN_IDLE_STREAM_TIMEOUT" in events
        bench.table(route(state="waking"))
        status, _, answer = await bench.post()
        assert status == 504 and "LLMRUN_REQUEST_TIMEOUT" in answer["error"]["message"]
    async with running_ingress(request_timeout=0.5) as bench:
        bench.table(route(engine.port))
        status, _, events = await bench.post({"model": "one", "hang": True})
        assert status == 200 and b"LLMRUN_REQUEST_TIMEOUT" in events and events.startswith(CHUNKS[0])


async def test_the_engine_is_notified_when_the_client_disconnects(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    answer = await bench.session.post(bench.url + CHAT, json={"model": "one", "hang": True})
    assert await answer.content.readany() == CHUNKS[0]
    assert bench.queue.traffic()["one"].in_flight == 1
    answer.close()
    await asyncio.wait_for(engine.client_left.wait(), 1)
    while bench.queue.traffic():
        await asyncio.sleep(0.01)


async def test_requests_above_max_ongoing_are_queued(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, max_ongoing=1))
    first = await bench.session.post(bench.url + CHAT, json={"model": "one", "hang": True})
    second = asyncio.create_task(bench.post())
    while not bench.queue.traffic()["one"].waiting:
        await asyncio.sleep(0.01)
    first.close()
    assert (await second)[0] == 200


async def test_requests_for_control_are_forwarded(bench: Bench, engine: Engine) -> None:
    bench.table(control=engine.serve_http())
    status, _, raw = await bench.post(path="/llmrun/v1/plan", headers={"authorization": "Bearer key"})
    assert (status, raw) == (200, b"".join(CHUNKS))
    assert engine.requests[0].headers["authorization"] == "Bearer key"
    bench.table(control=("127.0.0.1", 1))
    status, _, answer = await bench.post(path="/llmrun/v1/plan")
    assert (status, answer["error"]["code"]) == (503, "control_away")


async def test_control_is_not_kept_busy_by_requests_without_its_key(bench: Bench, engine: Engine) -> None:
    bench.table(control=engine.serve_http(), admin=digest_of("secret"))
    for headers in ({}, {"authorization": "Bearer guess"}, {"authorization": "Basic secret"}):
        status, _, answer = await bench.post(path="/llmrun/v1/plan", headers=headers)
        assert status == 401 and answer["error"]["code"] == "invalid_admin_key"
    assert not engine.requests
    headers = {"authorization": "Bearer secret", CLIENT_HEADER: "203.0.113.9"}
    assert (await bench.post(path="/llmrun/v1/plan", headers=headers))[0] == 200
    assert engine.requests[0].headers.getlist(CLIENT_HEADER) == ["127.0.0.1"]  # not what the client claims


def test_routing_chooses_the_least_busy_free_replica() -> None:
    model = route(1, 2, 3)
    assert choose(model, {}) == model.replicas[0]
    assert choose(model, {"r1": 1}) == model.replicas[1]
    assert choose(model, {"r1": 1, "r2": 1, "r3": 1}, avoid=["r1"]) == model.replicas[1]
    assert choose(model, {"r1": 2, "r2": 2, "r3": 2}) is None
    assert choose(replace(model, replicas=()), {}) is None


def test_equal_prompt_prefixes_go_to_the_same_replica() -> None:
    model = route(*range(1, 5), max_ongoing=100)
    prefixes = [f"prompt {number}".encode() for number in range(40)]
    homes = {prefix: choose(model, {}, prefix=prefix) for prefix in prefixes}
    assert {replica.id for replica in homes.values() if replica} == {"r1", "r2", "r3", "r4"}
    fewer = replace(model, replicas=model.replicas[:3])
    moved = [prefix for prefix, home in homes.items() if choose(fewer, {}, prefix=prefix) != home]
    assert all(homes[prefix] == model.replicas[3] for prefix in moved)
    home = homes[prefixes[0]]
    assert home
    assert choose(model, {home.id: 4}, prefix=prefixes[0]) == home
    assert choose(model, {home.id: 5}, prefix=prefixes[0]) != home
    assert choose(model, {}, avoid=[home.id], prefix=prefixes[0]) != home


def test_the_prefix_of_a_prompt_is_limited() -> None:
    turn = {"model": "one", "messages": [{"role": "user", "content": "x" * 2000}]}
    longer = {**turn, "messages": [*turn["messages"], {"role": "assistant", "content": "y"}]}
    first, second = (parse_request(json.dumps(body).encode()).prefix for body in (turn, longer))
    assert first == second and first.startswith(b'"messages"') and len(first) == 1024
    assert parse_request(b'{"model": "one", "messages": []}').prefix == b""


async def test_a_client_that_does_not_wait_gets_retry_after(bench: Bench) -> None:
    bench.table(route(state="waking", usual_start=3.2))
    for limit, seconds in (("0", 0.0), ("0.3", 0.3)):
        started = time.monotonic()
        status, headers, answer = await bench.post(headers={"X-LLMRun-Max-Wait": limit})
        assert (status, answer["error"]["code"]) == (503, "model_not_ready")
        assert seconds <= time.monotonic() - started < seconds + 0.3
        assert headers["retry-after"] == {"0": "4", "0.3": "3"}[limit]
    assert bench.queue.traffic()["one"].waiting == 1  # one placeholder for both
    bench.table(route(9))
    await asyncio.sleep(0.05)
    assert bench.idle
    bench.table(route(state="waking", usual_start=900))
    assert (await bench.post(headers={"X-LLMRun-Max-Wait": "0"}))[1]["retry-after"] == "120"
    for invalid in ("soon", "-1", "inf", "nan"):
        status, _, answer = await bench.post(headers={"X-LLMRun-Max-Wait": invalid})
        assert status == 400 and f"{invalid!r} must be a number of seconds" in answer["error"]["message"]


async def test_a_priority_is_for_the_ingress_only(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    assert (await bench.post(headers={"X-LLMRun-Priority": "high"}))[0] == 200
    assert "x-llmrun-priority" not in engine.requests[0].headers
    status, _, answer = await bench.post(headers={"X-LLMRun-Priority": "urgent"})
    assert status == 400 and answer["error"]["code"] == "invalid_header"
    assert answer["error"]["message"].endswith("'urgent' must be high, normal or batch")


async def test_a_full_queue_rejects_requests(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="waking", max_queued=2))
    first = [asyncio.create_task(bench.post()) for _ in range(2)]
    while bench.queue.traffic().get("one", Traffic()).waiting < 2:
        await asyncio.sleep(0.01)
    status, headers, answer = await bench.post()
    assert (status, answer["error"]["code"]) == (429, "queue_full") and int(headers["retry-after"]) > 0
    assert "the queue of one is full: 2 requests are waiting" in answer["error"]["message"]
    bench.table(route(engine.port, max_queued=2))
    assert [(await one)[0] for one in first] == [200, 200]


@pytest.fixture
async def keepalive_bench() -> AsyncIterator[Bench]:
    """An ingress that sends keepalive comments every 0.2 s."""
    async with running_ingress(keepalive=KeepaliveTiming(0.2, 0.2)) as bench:
        yield bench


async def test_a_waiting_stream_gets_keepalive_comments(keepalive_bench: Bench, engine: Engine) -> None:
    bench = keepalive_bench
    bench.table(route(state="waking", phase="loading weights"))
    pending = asyncio.create_task(bench.post({"model": "one", "stream": True}))
    plain = asyncio.create_task(bench.post())
    await asyncio.sleep(0.7)
    assert not plain.done()
    bench.table(route(engine.port))
    status, headers, body = await pending
    assert status == 200 and headers["content-type"].startswith("text/event-stream") and "x-request-id" in headers
    assert body.startswith(b": waking one, 0 s, loading weights\n\n: waking one, ")
    assert body.endswith(b"".join(CHUNKS)) and body.count(b"data: ") == len(CHUNKS)
    assert (await plain)[2] == b"".join(CHUNKS)


async def test_an_error_after_the_first_comment_is_an_event(keepalive_bench: Bench, engine: Engine) -> None:
    bench = keepalive_bench
    bench.table(route(state="waking"))
    body = (await bench.post({"model": "one", "stream": True}))[2]
    assert body.startswith(b": waking one, 0 s\n\n")
    event = json.loads(body.rpartition(b"data: ")[2])
    assert event["error"]["code"] == "model_not_ready" and "timed out after 1.5 s" in event["error"]["message"]
    pending = asyncio.create_task(bench.post({"model": "one", "stream": True, "refuse": True}))
    await asyncio.sleep(0.5)
    bench.table(route(engine.port))
    status, _, body = await pending
    error = {"message": "no\nsuch", "type": "invalid_request_error", "param": None, "code": "invalid_request"}
    assert status == 200 and json.loads(body.rpartition(b"data: ")[2]) == {"error": error}


async def test_a_replica_never_gets_more_requests_than_max_ongoing(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="waking", max_ongoing=1))
    hanging = [asyncio.create_task(bench.post({"model": "one", "hang": True})) for _ in range(3)]
    while bench.queue.traffic().get("one", Traffic()).waiting < 3:
        await asyncio.sleep(0.01)
    async with Engine().running() as other:
        bench.table(route(engine.port, other.port, max_ongoing=1))
        await asyncio.sleep(0.3)
        assert len(engine.requests) == len(other.requests) == 1
        assert bench.queue.traffic()["one"] == Traffic(1, 2, bench.queue.traffic()["one"].since)
        hanging[0].cancel()
        await asyncio.sleep(0.3)
        assert len(engine.requests) + len(other.requests) == 3
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        while bench.queue.traffic():
            await asyncio.sleep(0.01)


async def test_a_client_of_the_same_home_can_verify_the_ingress(bench: Bench) -> None:
    challenge = {CHALLENGE_HEADER: "c" * 32}
    async with bench.session.get(f"{bench.url}/health", headers=challenge) as response:
        assert PROOF_HEADER not in response.headers, "the ingress does not know the admin key yet"
    bench.table(route(1), admin=digest_of("the key"))
    port = int(bench.url.rpartition(":")[2])
    async with bench.session.get(f"{bench.url}/health", headers=challenge) as response:
        assert is_proof(response.headers[PROOF_HEADER], "the key", "c" * 32, port)
        assert not is_proof(response.headers[PROOF_HEADER], "the key", "c" * 32, port + 1)
    for headers in ({}, {CHALLENGE_HEADER: "c" * 1000}):
        async with bench.session.get(f"{bench.url}/health", headers=headers) as response:
            assert response.status == 200 and PROOF_HEADER not in response.headers
