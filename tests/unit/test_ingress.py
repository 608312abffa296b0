"""The ingress on a real port, in front of a stand-in for engines that fails in ways a real one cannot be made to."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from llmrun_runtime import http
from llmrun_runtime.ingress.admission.request import read_request
from llmrun_runtime.ingress.queue import caller_wait
from llmrun_runtime.ingress.routing import choose
from llmrun_runtime.wire.headers import TOKEN_HEADER
from llmrun_runtime.wire.reports import Traffic
from tests.support.ingress import CHAT, PIECES, Bench, Engine, an_ingress, route


async def test_streams_are_the_engines_byte_for_byte(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    body = b'{ "model" : "org/one", "odd":  1e3 }'
    headers = {"authorization": "Bearer mine", "x-request-id": "abc", TOKEN_HEADER: "forged", "x-other": "kept"}
    status, answered, raw = await bench.ask(body, CHAT + "?a=b%20c", headers=headers)
    assert (status, raw) == (200, b"".join(PIECES))
    assert (answered["x-engine"], answered["x-request-id"]) == ("yes", "abc")
    (asked,) = engine.asked
    assert await asked.body() == body and asked.url.query == "a=b%20c"
    assert asked.headers[TOKEN_HEADER] == f"t{engine.port}" and asked.headers["x-other"] == "kept"
    assert "authorization" not in asked.headers and asked.headers["x-request-id"] == "abc"


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        (b"{nonsense", 400, "invalid_json", "no JSON"),
        (b"\xff\xfe\x00", 400, "invalid_json", "no JSON"),
        (b"[" * 100_000, 400, "invalid_json", "no JSON"),
        (b"[1]", 400, "invalid_json", "must be a JSON object, not list"),
        (b'{"messages": []}', 400, "missing_model", "has no 'model'"),
        (b'{"model": "one", "x": {"model": 1}, "model": "two"}', 400, "duplicate_key", "'model' more than once"),
        (b'{"model": "one", "stream": true, "stream": false}', 400, "duplicate_key", "'stream' more than once"),
        (b'{"model": "one", "mod\\u0065l": "two"}', 400, "duplicate_key", "'model' more than once"),
        (b'{"model": 7}', 400, "invalid_model", "must be a string, not int"),
        (b'{"model": "ona"}', 404, "model_not_found", "did you mean 'one'? there are one, org/one"),
        (b'{"model": "one", "x": "' + b"y" * 2**20 + b'"}', 413, "body_too_large", "over 1 MiB"),
    ],
)
async def test_bad_bodies(bench: Bench, engine: Engine, body: bytes, status: int, code: str, words: str) -> None:
    bench.table(route(engine.port))
    got, headers, answer = await bench.ask(body)
    assert (got, answer["error"]["code"], answer["error"]["type"]) == (status, code, "invalid_request_error")
    assert words in answer["error"]["message"] and headers["x-request-id"]
    assert engine.asked == []


async def test_a_body_of_unknown_length_is_cut_off_at_the_limit(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 2**16

    async with bench.session.post(bench.url + CHAT, data=endless()) as answer:
        assert answer.status == 413


async def test_a_nested_model_key_is_nobodys_business(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    assert (await bench.ask(b'{"model": "one", "x": [{"model": 1}, {"model": 2, "model": 3}]}'))[0] == 200


async def test_unknown_paths_and_methods(bench: Bench, engine: Engine) -> None:
    assert "nothing is deployed" in (await bench.ask())[2]["error"]["message"]
    assert (await bench.ask(b"{nonsense"))[0] == 400
    bench.table(route(engine.port), route(engine.port, name="two", names=("two",), paths=frozenset({"/v1/embeddings"})))
    for path in ("/", "/v1", "/v1/load_lora_adapter", "/sleep", "/load", CHAT + "/"):
        status, _, answer = await bench.ask(path=path)
        assert (status, answer["error"]["code"]) == (404, "path_not_found")
    status, _, answer = await bench.ask({"model": "two"})
    assert status == 404 and answer["error"]["message"] == f"two has no {CHAT}: it has /v1/embeddings"
    async with bench.session.get(bench.url + CHAT) as answer:
        assert answer.status == 405
    assert (await bench.ask(path="/v1/models"))[0] == 405
    assert engine.asked == []


async def test_models_come_from_the_table(bench: Bench) -> None:
    bench.table(route(state="cold"))
    async with bench.session.get(bench.url + "/v1/models") as answer:
        (listed,) = (await answer.json())["data"]
    assert listed["id"] == "one" and listed["created"] == 7 and listed["llmrun"]["state"] == "cold"
    async with bench.session.get(bench.url + "/v1/models/org/one") as answer:
        assert (await answer.json())["id"] == "org/one"
    async with bench.session.get(bench.url + "/v1/models/nobody") as answer:
        assert (await answer.json())["error"]["param"] == "model"


async def test_a_request_at_zero_waits_for_its_replica(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="cold"))
    asked = asyncio.create_task(bench.ask())
    while not bench.waiting.traffic():
        await asyncio.sleep(0.01)
    assert bench.waiting.traffic()["one"].waiting == 1
    bench.table(route(engine.port))
    assert (await asked)[0] == 200
    assert bench.waiting.traffic() == {}


async def test_who_waits_hears_why_a_start_failed_and_the_next_one_may_wait_again(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="cold", failures=1, cause="an older one"))
    asked = asyncio.create_task(bench.ask())
    while not bench.waiting.traffic():
        await asyncio.sleep(0.01)
    bench.table(route(state="cold", failures=2, cause="out of memory"))
    status, headers, answer = await asked
    assert status == 503 and answer["error"]["message"] == "one did not start: out of memory"
    assert int(headers["retry-after"]) > 0
    bench.table(route(state="failed", failures=3, cause="out of memory", paused=True))
    assert (await bench.ask())[2]["error"]["code"] == "model_failed"


async def test_the_wait_has_a_deadline_and_its_cause(bench: Bench) -> None:
    bench.table(route(state="waking", cause="no room now: it needs 1 GPU"))
    status, _, answer = await bench.ask()
    assert (status, answer["error"]["code"]) == (503, "model_not_ready")
    assert answer["error"]["message"] == "one was not ready within 1.5 s: no room now: it needs 1 GPU"
    assert bench.waiting.traffic() == {}


async def test_a_model_that_is_deleted_while_callers_wait(bench: Bench) -> None:
    bench.table(route(state="cold"))
    asked = asyncio.create_task(bench.ask())
    while not bench.waiting.traffic():
        await asyncio.sleep(0.01)
    bench.table()
    assert (await asked)[0] == 404


async def test_a_replica_that_is_gone_is_left_for_another(bench: Bench, engine: Engine) -> None:
    gone = http.bind("127.0.0.1", 0)
    port = gone.getsockname()[1]
    gone.close()
    bench.table(route(port, engine.port))
    assert (await bench.ask())[0] == 200


async def test_replicas_that_die_before_their_first_byte(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    status, _, answer = await bench.ask({"model": "one", "die_early": True})
    assert (status, answer["error"]["code"]) == (503, "replica_gone")
    assert len(engine.asked) == 2


async def test_a_refused_connection_is_tried_again_until_the_deadline(bench: Bench, engine: Engine) -> None:
    late = http.bind("127.0.0.1", 0)
    port = late.getsockname()[1]
    late.close()
    bench.table(route(port))
    asked = asyncio.create_task(bench.ask())
    while not bench.waiting.traffic():
        await asyncio.sleep(0.01)
    bench.table(route(engine.port))
    assert (await asked)[0] == 200
    bench.table(route(port))
    status, _, answer = await bench.ask()
    assert status == 503 and "had no room within 1.5 s" in answer["error"]["message"]


async def test_a_stream_that_breaks_off_ends_with_an_error_event(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    status, _, answer = await bench.ask({"model": "one", "die_late": True})
    *events, error = answer.decode(errors="replace").strip().split("\n\n")
    assert status == 200 and events[0] == "data: {}" and "data: [DONE]" not in events
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "stream_broken_off"


async def test_an_engine_that_fails_within_one_request_harms_no_other(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    other = await bench.session.post(bench.url + CHAT, json={"model": "one", "hang": True})
    status, _, answer = await bench.ask({"model": "one", "fail": True})
    assert status == 200 and b"stream_broken_off" in answer
    assert not engine.left.is_set() and await other.content.readany() == PIECES[0]
    other.close()


async def test_headers_that_are_too_large_harm_nobody_else(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    other = await bench.session.post(bench.url + CHAT, json={"model": "one", "hang": True})
    status, _, answer = await bench.ask(headers={"x-large": "x" * 300_000})
    assert (status, answer["error"]["code"]) == (431, "headers_too_large")
    assert not engine.left.is_set()
    other.close()


async def test_deadlines_that_are_set_are_kept(engine: Engine) -> None:
    async with an_ingress(first_byte_timeout=0.3, idle_stream_timeout=0.6, request_timeout=1) as bench:
        bench.table(route(engine.port))
        status, _, answer = await bench.ask({"model": "one", "stall": 5})
        assert status == 504 and "LLMRUN_FIRST_BYTE_TIMEOUT" in answer["error"]["message"]
        status, _, events = await bench.ask({"model": "one", "hang": True})
        assert status == 200 and b"LLMRUN_IDLE_STREAM_TIMEOUT" in events
        bench.table(route(state="waking"))
        status, _, answer = await bench.ask()
        assert status == 504 and "LLMRUN_REQUEST_TIMEOUT" in answer["error"]["message"]
    async with an_ingress(request_timeout=0.5) as bench:
        bench.table(route(engine.port))
        status, _, events = await bench.ask({"model": "one", "hang": True})
        assert status == 200 and b"LLMRUN_REQUEST_TIMEOUT" in events and events.startswith(PIECES[0])


async def test_the_engine_hears_that_the_client_is_gone(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    answer = await bench.session.post(bench.url + CHAT, json={"model": "one", "hang": True})
    assert await answer.content.readany() == PIECES[0]
    assert bench.waiting.traffic()["one"].in_flight == 1
    answer.close()
    await asyncio.wait_for(engine.left.wait(), 1)
    while bench.waiting.traffic():
        await asyncio.sleep(0.01)


async def test_requests_above_max_ongoing_wait_their_turn(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, max_ongoing=1))
    first = await bench.session.post(bench.url + CHAT, json={"model": "one", "hang": True})
    second = asyncio.create_task(bench.ask())
    while not bench.waiting.traffic()["one"].waiting:
        await asyncio.sleep(0.01)
    first.close()
    assert (await second)[0] == 200


async def test_control_is_relayed_and_missed(bench: Bench, engine: Engine) -> None:
    bench.table(control=("127.0.0.1", engine.http_port))
    status, _, raw = await bench.ask(path="/llmrun/v1/plan", headers={"authorization": "Bearer key"})
    assert (status, raw) == (200, b"".join(PIECES))
    assert engine.asked[0].headers["authorization"] == "Bearer key"
    bench.table(control=("127.0.0.1", 1))
    status, _, answer = await bench.ask(path="/llmrun/v1/plan")
    assert (status, answer["error"]["code"]) == (503, "control_away")


def test_routing_takes_the_least_busy_that_has_room() -> None:
    model = route(1, 2, 3)
    assert choose(model, {}) == model.replicas[0]
    assert choose(model, {"r1": 1}) == model.replicas[1]
    assert choose(model, {"r1": 1, "r2": 1, "r3": 1}, avoid=["r1"]) == model.replicas[1]
    assert choose(model, {"r1": 2, "r2": 2, "r3": 2}) is None
    assert choose(replace(model, replicas=()), {}) is None


def test_equal_beginnings_of_prompts_go_to_the_same_replica_when_load_allows() -> None:
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


def test_the_beginning_of_a_long_prompt_is_read() -> None:
    turn = {"model": "one", "messages": [{"role": "user", "content": "x" * 2000}]}
    longer = {**turn, "messages": [*turn["messages"], {"role": "assistant", "content": "y"}]}
    first, second = (read_request(json.dumps(body).encode()).prefix for body in (turn, longer))
    assert first == second and first.startswith(b'"messages"') and len(first) == 1024
    assert read_request(b'{"model": "one", "messages": []}').prefix == b""


async def test_who_does_not_want_to_wait_is_told_when_to_come_back_and_the_wake_goes_on(bench: Bench) -> None:
    bench.table(route(state="waking", usual_start=3.2))
    for limit, least in (("0", 0.0), ("0.3", 0.3)):
        begun = time.monotonic()
        status, headers, answer = await bench.ask(headers={"X-LLMRun-Max-Wait": limit})
        assert (status, answer["error"]["code"]) == (503, "model_not_ready")
        assert least <= time.monotonic() - begun < least + 0.3
        assert headers["retry-after"] == {"0": "4", "0.3": "3"}[limit]
    assert bench.waiting.traffic()["one"].waiting == 1  # in the place of both
    bench.table(route(9))
    await asyncio.sleep(0.05)
    assert bench.waiting.traffic() == {}
    bench.table(route(state="waking", usual_start=900))
    assert (await bench.ask(headers={"X-LLMRun-Max-Wait": "0"}))[1]["retry-after"] == "120"
    for wrong in ("soon", "-1", "inf", "nan"):
        status, _, answer = await bench.ask(headers={"X-LLMRun-Max-Wait": wrong})
        assert status == 400 and f"{wrong!r} is no number of seconds" in answer["error"]["message"]


async def test_a_queue_has_an_end(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="waking", max_queued=2))
    first = [asyncio.create_task(bench.ask()) for _ in range(2)]
    while bench.waiting.traffic().get("one", Traffic()).waiting < 2:
        await asyncio.sleep(0.01)
    status, headers, answer = await bench.ask()
    assert (status, answer["error"]["code"]) == (429, "queue_full") and int(headers["retry-after"]) > 0
    assert "2 requests wait for one already" in answer["error"]["message"]
    bench.table(route(engine.port, max_queued=2))
    assert [(await one)[0] for one in first] == [200, 200]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments after 0.2 s."""
    monkeypatch.setattr(caller_wait, "QUIET_S", 0.2)
    monkeypatch.setattr(caller_wait, "EVERY_S", 0.2)


@pytest.mark.usefixtures("impatient")
async def test_a_streaming_caller_who_waits_hears_comments_and_then_the_engines_bytes(
    bench: Bench, engine: Engine
) -> None:
    bench.table(route(state="waking", phase="loading weights"))
    asked = asyncio.create_task(bench.ask({"model": "one", "stream": True}))
    plain = asyncio.create_task(bench.ask())
    await asyncio.sleep(0.7)
    assert not plain.done()
    bench.table(route(engine.port))
    status, headers, body = await asked
    assert status == 200 and headers["content-type"].startswith("text/event-stream") and "x-request-id" in headers
    assert body.startswith(b": waking one, 0 s, loading weights\n\n: waking one, ")
    assert body.endswith(b"".join(PIECES)) and body.count(b"data: ") == len(PIECES)
    assert (await plain)[2] == b"".join(PIECES)


@pytest.mark.usefixtures("impatient")
async def test_what_goes_wrong_after_the_first_comment_is_an_event(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="waking"))
    body = (await bench.ask({"model": "one", "stream": True}))[2]
    assert body.startswith(b": waking one, 0 s\n\n")
    event = json.loads(body.rpartition(b"data: ")[2])
    assert event["error"]["code"] == "model_not_ready" and "not ready within 1.5 s" in event["error"]["message"]
    asked = asyncio.create_task(bench.ask({"model": "one", "stream": True, "refuse": True}))
    await asyncio.sleep(0.5)
    bench.table(route(engine.port))
    status, _, body = await asked
    assert status == 200 and json.loads(body.rpartition(b"data: ")[2]) == {"error": {"message": "no\nsuch"}}


async def test_each_place_at_a_replica_is_given_once(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="waking", max_ongoing=1))
    hung = [asyncio.create_task(bench.ask({"model": "one", "hang": True})) for _ in range(3)]
    while bench.waiting.traffic().get("one", Traffic()).waiting < 3:
        await asyncio.sleep(0.01)
    async with Engine().running() as other:
        bench.table(route(engine.port, other.port, max_ongoing=1))
        await asyncio.sleep(0.3)
        assert len(engine.asked) == len(other.asked) == 1
        assert bench.waiting.traffic()["one"] == Traffic(1, 2, bench.waiting.traffic()["one"].since)
        hung[0].cancel()
        await asyncio.sleep(0.3)
        assert len(engine.asked) + len(other.asked) == 3
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)
        while bench.waiting.traffic():
            await asyncio.sleep(0.01)
