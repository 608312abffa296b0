"""What real clients send and expect: encodings, paths, keys, and errors in the shape of each API."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import tracemalloc
import zlib
from typing import Any

import anthropic
import openai
import pytest

from llmrun.wire import KeyInfo
from llmrun_runtime.ingress.admission import encodings
from llmrun_runtime.ingress.admission.encodings import decode
from llmrun_runtime.ingress.admission.paths import canonical_path, path_not_found
from llmrun_runtime.ingress.admission.request import parse_request
from llmrun_runtime.ingress.engine_errors import engine_error
from llmrun_runtime.ingress.error_shapes import ErrorShape
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.queue.keepalive import KeepaliveTiming
from tests.support.ingress import CHAT, CHUNKS, Bench, Engine, bearer, keys, route, running_ingress

MESSAGES, RESPONSES, EMBEDDINGS = "/v1/messages", "/v1/responses", "/v1/embeddings"
ALL = frozenset({CHAT, MESSAGES, RESPONSES, EMBEDDINGS, "/v1/completions", "/score"})
BODY = b'{"model": "one", "messages": []}'


def gz(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)


def zst(body: bytes) -> bytes:
    compressed: bytes = encodings.zstd.compress(body)  # type: ignore[attr-defined]
    return compressed


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(body) + compressor.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gz(BODY)),
        ("x-gzip", gz(BODY)),
        ("GZip", gz(BODY[:9]) + gz(BODY[9:])),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("zstd", zst(BODY)),
        ("identity", BODY),
    ],
)
async def test_compressed_bodies_are_decoded(bench: Bench, engine: Engine, encoding: str, body: bytes) -> None:
    bench.table(route(engine.port))
    assert (await bench.post(body, headers={"content-encoding": encoding}))[0] == 200
    assert engine.body == json.loads(BODY) and "content-encoding" not in engine.requests[-1].headers
    assert engine.requests[-1].headers["content-length"] == str(len(BODY))


@pytest.mark.parametrize(
    ("encoding", "body", "status", "message"),
    [
        ("br", BODY, 415, "content encoding 'br' is not supported: send one of gzip, deflate, zstd, or none"),
        ("gzip, zstd", BODY, 415, "'gzip, zstd' is not supported"),
        ("gzip", BODY, 400, "not valid gzip: "),
        ("gzip", gz(BODY)[:-9], 400, "not valid gzip: it ends too early"),
        ("zstd", zst(BODY)[:-3], 400, "not valid zstd: it ends too early"),
        ("zstd", BODY, 400, "not valid zstd: "),
        ("deflate", b"\x78\x9c\xff\xff", 400, "not valid deflate: "),
        ("gzip", gz(bytes(2**20 + 1)), 413, "larger than 1 MiB after decoding (gzip)"),
        ("zstd", zst(bytes(2**20 + 1)), 413, "larger than 1 MiB after decoding (zstd)"),
        ("gzip", gz(BODY) + gz(bytes(2**20)), 413, "after decoding"),
    ],
)
async def test_broken_and_unknown_encodings(
    bench: Bench, engine: Engine, encoding: str, body: bytes, status: int, message: str
) -> None:
    bench.table(route(engine.port))
    actual, _, answer = await bench.post(body, headers={"content-encoding": encoding})
    assert (actual, message in answer["error"]["message"]) == (status, True), answer
    assert engine.requests == []


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_bomb_costs_no_more_than_the_limit(encoding: str) -> None:
    zeros = bytes(2**24)
    if encoding == "gzip":
        compressor = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
        bomb = b"".join(compressor.compress(zeros) for _ in range(64)) + compressor.flush()
    else:
        bomb = zst(zeros) * 64
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(HTTPError, match="larger than 1 MiB after decoding"):
        decode(bomb, encoding, 2**20)
    assert time.process_time() - began < 0.5, "1 GiB is not decoded"
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


async def test_decoded_bytes_count_as_held(engine: Engine) -> None:
    async with running_ingress(max_held_bytes=10_000) as bench:
        bench.table(route(engine.port))
        body = gz(json.dumps({"model": "one", "x": "a" * 20_000}).encode())
        status, _, answer = await bench.post(body, headers={"content-encoding": "gzip"})
        assert (status, answer["error"]["code"]) == (503, "ingress_full")
        assert (await bench.post())[0] == 200, "nothing stays counted"


@pytest.mark.parametrize(
    ("path", "meant", "deployment"),
    [
        ("/chat/completions", CHAT, ""),
        ("/v1/chat/completions/", CHAT, ""),
        ("//v1//chat/completions", CHAT, ""),
        ("/v1/v1/chat/completions", CHAT, ""),
        ("/v1/v1/v1/messages", MESSAGES, ""),
        ("/openai/v1/responses", RESPONSES, ""),
        ("/openai/deployments/one/chat/completions", CHAT, "one"),
        ("/openai/deployments/org/one/embeddings", EMBEDDINGS, "org/one"),
        ("/models", "/v1/models", ""),
        ("/v1/models/", "/v1/models", ""),
        ("/models/org/one", "/v1/models/org/one", ""),
        ("/score/", "/score", ""),
        ("/v1/score", "/v1/score", ""),
        ("/openai/deployments/one", "/openai/deployments/one", ""),
        ("/v1/chat", "/v1/chat", ""),
        ("/", "/", ""),
    ],
)
def test_the_path_that_is_meant(path: str, meant: str, deployment: str) -> None:
    assert canonical_path(path, ALL) == (meant, deployment)


@pytest.mark.parametrize(
    "path", ["/openai/deployments/" + "a/" * 31_000 + "a\n", "/v1" * 20_000 + "/x", "/" * 60_000, "/openai" * 9000]
)
def test_a_long_path_takes_no_time(path: str) -> None:
    began = time.process_time()
    assert canonical_path(path, ALL) == (path, "")
    assert len(path_not_found(path, ALL).message) < 500
    assert time.process_time() - began < 0.1


def test_a_search_for_broken_text_takes_no_memory() -> None:
    body = json.dumps({"model": "one", "x": "😀", "k" * 100_000: [1] * 50_000}).encode()
    tracemalloc.start()
    assert parse_request(body).model == "one"
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()
    with pytest.raises(HTTPError) as error:
        parse_request(b'{"model": "one", "' + b"k" * 100_000 + rb'": ["\ud800"]}')
    assert len(error.value.message) < 500


@pytest.mark.parametrize(("encoding", "empty"), [("gzip", gz(b"")), ("zstd", zst(b""))])
def test_many_streams_in_a_row_are_refused(encoding: str, empty: bytes) -> None:
    began = time.process_time()
    with pytest.raises(HTTPError, match="more than 16 streams"):
        decode(empty * (2**20 // len(empty)), encoding, 2**20)
    assert time.process_time() - began < 0.5


async def test_other_spellings_of_paths_are_served(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, paths=ALL))
    for path in ("/chat/completions", "/v1/v1/chat/completions", CHAT + "/", "/openai" + CHAT + "?api-version=1"):
        assert (await bench.post(path=path))[0] == 200, path
        assert engine.requests[-1].url.path == CHAT
    azure = "/openai/deployments/one/chat/completions?api-version=2024-10-21"
    bodies: list[dict[str, Any]] = [{"messages": []}, {"model": "gpt-4", "messages": []}]
    for body in bodies:
        assert (await bench.post(body, azure))[0] == 200
        assert engine.body["model"] == "one", "the deployment counts, as at Azure"
    for path, hint in (("/v1/chat/completion", f"Did you mean {CHAT}?"), ("/api/generate", "See GET /openapi.json")):
        status, _, answer = await bench.post(path=path)
        assert (status, answer["error"]["code"]) == (404, "path_not_found") and hint in answer["error"]["message"]
    for method in ("GET", "HEAD"):
        async with bench.session.request(method, bench.url + "/") as answer:
            assert answer.status == 200


async def test_any_valid_key_opens(bench: Bench, engine: Engine) -> None:
    bench.table(
        route(engine.port),
        keys=keys(KeyInfo(name="good"), KeyInfo(name="old", expires=1), KeyInfo(name="looks", role="viewer")),
    )
    for headers in (
        {"authorization": "bearer good"},
        {"x-api-key": "good"},
        {"api-key": "good"},
        {"authorization": "Bearer dummy", "x-api-key": "good"},
        {"authorization": "Bearer good", "x-api-key": "dummy"},
        {"authorization": "Bearer old", "api-key": "good"},
        {"authorization": "Bearer looks", "api-key": "good"},
    ):
        assert (await bench.post(headers=headers))[0] == 200, headers
        assert not {"authorization", "x-api-key", "api-key"} & set(engine.requests[-1].headers.keys())
    for headers, code in (
        ({"authorization": "Bearer dummy", "x-api-key": "other"}, "invalid_api_key"),
        ({"authorization": "Bearer old", "x-api-key": "dummy"}, "expired_api_key"),
        ({"authorization": "Basic good"}, "missing_api_key"),
    ):
        status, _, answer = await bench.post(headers=headers)
        assert (status, answer["error"]["code"]) == (401, code), headers


async def test_cors_headers_are_on_errors_too(engine: Engine) -> None:
    async with running_ingress(cors_origins="https://app.example", max_body_bytes=1000) as bench:
        origin = {"origin": "https://app.example"}
        bench.table(route(engine.port), keys=keys(KeyInfo(name="slow", rpm=1), KeyInfo(name="good")))
        assert (await bench.post(headers=origin | bearer("slow")["headers"]))[0] == 200
        for headers, path, status in (
            ({}, CHAT, 401),
            (bearer("slow")["headers"], CHAT, 429),
            (bearer("good")["headers"], "/chat/nonsense", 404),
            (bearer("good")["headers"], "/chat/completions", 200),
        ):
            actual, answered, _ = await bench.post(path=path, headers=origin | headers)
            assert (actual, answered["access-control-allow-origin"]) == (status, "https://app.example")


async def test_errors_of_messages_have_anthropics_shape(engine: Engine) -> None:
    limited = keys(KeyInfo(name="slow", rpm=1), KeyInfo(name="few", models=("two",)), KeyInfo(name="good"))
    async with running_ingress(wake_timeout=0.1) as bench:
        bench.table(route(engine.port, paths=ALL), route(name="cold", names=("cold",), paths=ALL), keys=limited)

        async def ask(key: str, model: str = "one", **more: Any) -> None:
            async with anthropic.AsyncAnthropic(api_key=key, base_url=bench.url, max_retries=0) as client:
                await client.messages.create(
                    model=model, max_tokens=8, messages=[{"role": "user", "content": "Hi"}], extra_body=more
                )

        expected: list[tuple[tuple[str, ...], dict[str, Any], type[anthropic.APIStatusError], str]] = [
            (("nobody",), {}, anthropic.AuthenticationError, "authentication_error"),
            (("good", "unknown"), {}, anthropic.NotFoundError, "not_found_error"),
            (("few",), {}, anthropic.NotFoundError, "not_found_error"),
            (("good",), {"x": "a" * 2**20}, anthropic.RequestTooLargeError, "request_too_large"),
            (("good",), {"refuse": True}, anthropic.BadRequestError, "invalid_request_error"),
            (("good", "cold"), {}, anthropic.ServiceUnavailableError, "overloaded_error"),
            (("slow", "unknown"), {}, anthropic.NotFoundError, "not_found_error"),
            (("slow",), {}, anthropic.RateLimitError, "rate_limit_error"),
        ]
        for arguments, more, error, kind in expected:
            with pytest.raises(error) as raised:
                await ask(*arguments, **more)
            body = raised.value.body
            assert isinstance(body, dict) and body["type"] == "error" and body["error"]["type"] == kind
            assert body["request_id"] == raised.value.response.headers["request-id"] == raised.value.request_id


@pytest.mark.parametrize("failure", ["die_late", "fail"])
async def test_a_stream_that_breaks_raises_in_every_client(bench: Bench, engine: Engine, failure: str) -> None:
    bench.table(route(engine.port, paths=ALL))
    messages: Any = [{"role": "user", "content": "Hi"}]
    claude = anthropic.AsyncAnthropic(api_key="k", base_url=bench.url, max_retries=0)
    with pytest.raises(anthropic.APIStatusError, match="stream interrupted"):
        async for _ in await claude.messages.create(
            model="one", max_tokens=8, messages=messages, stream=True, extra_body={failure: True}
        ):
            pass
    gpt = openai.AsyncOpenAI(api_key="k", base_url=bench.url + "/v1", max_retries=0)
    with pytest.raises(openai.APIError, match="stream interrupted"):
        async for _ in await gpt.chat.completions.create(
            model="one", messages=messages, stream=True, extra_body={failure: True, "valid": True}
        ):
            pass
    stream = await gpt.responses.create(model="one", input="Hi", stream=True, extra_body={failure: True, "valid": True})
    last: Any = [event async for event in stream][-1]
    assert (last.response.id, last.sequence_number) == ("resp_1", 5), "it ends the response that has begun"
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error.code == "stream_broken_off" and "stream interrupted" in last.response.error.message
    await claude.close()
    await gpt.close()


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_a_cold_start_that_fails_after_comments(path: str) -> None:
    async with running_ingress(keepalive=KeepaliveTiming(0.05, 0.05), wake_timeout=0.3) as bench:
        bench.table(route(state="waking", paths=ALL))
        status, headers, body = await bench.post({"model": "one", "stream": True}, path)
        assert status == 200 and headers["x-accel-buffering"] == "no" and headers["cache-control"] == "no-cache"
        events = [event for event in body.decode().split("\n\n") if event and not event.startswith(":")]
        assert len(events) == 1
        *name, data = events[0].split("\n")
        event = json.loads(data.removeprefix("data: "))
        if path == CHAT:
            assert name == [] and event["error"]["code"] == "model_not_ready"
        elif path == MESSAGES:
            assert name == ["event: error"] and event["error"]["type"] == "overloaded_error"
        else:
            assert name == ["event: response.failed"] and event["type"] == "response.failed"
            assert event["response"]["error"]["code"] == "model_not_ready" and event["response"]["model"] == "one"


async def test_a_refusal_of_the_engine_after_comments_raises(engine: Engine) -> None:
    async with running_ingress(keepalive=KeepaliveTiming(0.05, 0.05), wake_timeout=5) as bench:
        bench.table(route(state="waking", paths=ALL))
        claude = anthropic.AsyncAnthropic(api_key="k", base_url=bench.url, max_retries=0)

        async def ask() -> None:
            stream = await claude.messages.create(
                model="one", max_tokens=8, messages=[], stream=True, extra_body={"refuse": True}
            )
            async for _ in stream:
                pass

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.3)
        bench.table(route(engine.port, paths=ALL))
        with pytest.raises(anthropic.APIStatusError, match="no\\\\nsuch"):
            await asking
        await claude.close()


async def test_comments_can_be_turned_off(engine: Engine) -> None:
    for header, setting, commented in (("", True, True), ("off", True, False), ("on", False, True), ("", False, False)):
        async with running_ingress(keepalive=KeepaliveTiming(0.05, 0.05), stream_comments=setting) as bench:
            bench.table(route(state="waking"))
            headers = {"X-LLMRun-Comments": header} if header else {}
            asking = asyncio.create_task(bench.post({"model": "one", "stream": True}, headers=headers))
            await asyncio.sleep(0.3)
            bench.table(route(engine.port))
            assert (await asking)[2].startswith(b": waking") == commented, (header, setting)
            status, _, answer = await bench.post(headers={"X-LLMRun-Comments": "maybe"})
            assert status == 400 and "must be on or off" in answer["error"]["message"]


async def test_embeddings_are_never_an_event_stream() -> None:
    async with running_ingress(keepalive=KeepaliveTiming(0.05, 0.05), wake_timeout=0.3) as bench:
        bench.table(route(state="waking", paths=ALL))
        status, headers, answer = await bench.post({"model": "one", "stream": True}, EMBEDDINGS)
        assert (status, answer["error"]["code"]) == (503, "model_not_ready")
        assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("value", "streams"),
    [
        (True, True),
        (1, True),
        (1.0, True),
        ("true", True),
        ("Yes", True),
        ("1", True),
        (0, False),
        ("no", False),
        (None, False),
        (2, False),
        ([1], False),
    ],
)
def test_stream_is_read_as_engines_read_it(value: Any, streams: bool) -> None:
    assert parse_request(json.dumps({"model": "one", "stream": value}).encode()).stream == streams


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (rb'{"model": "one", "messages": [{"role": "user", "content": "a\ud800b"}]}', "messages[0].content"),
        (rb'{"model": "one", "stop": ["a", "\uDFFF"]}', "stop[1]"),
        (rb'{"model": "one", "tools": [{"function": {"name": "\ud83d"}}]}', "tools[0].function.name"),
        (rb'{"model": "\ud800"}', "model"),
        (rb'{"model": "one", "x": {"\ud800": 1}}', "x.\\ud800"),
        (b'{"model": "one", "input": "\xed\xa0\x80"}', "input"),
        ('{"model": "one", "input": "a'.encode("utf-16-le") + b"\x00\xd8" + '"}'.encode("utf-16-le"), "input"),
    ],
)
def test_half_of_a_surrogate_pair_names_its_field(body: bytes, field: str) -> None:
    with pytest.raises(HTTPError, match="half of a surrogate pair") as error:
        parse_request(body)
    assert (error.value.status, error.value.code, error.value.param) == (400, "invalid_text", field)


def test_whole_pairs_are_text() -> None:
    assert parse_request(rb'{"model": "one", "input": "\ud83d\ude00 \\ud800"}').model == "one"
    assert parse_request('{"model": "one", "input": "😀"}'.encode()).model == "one"


async def test_responses_are_not_kept(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, paths=ALL))
    for field, value in (("previous_response_id", "resp_1"), ("store", True), ("background", True)):
        status, _, answer = await bench.post({"model": "one", "input": "Hi", field: value}, RESPONSES)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "responses_not_kept", field)
    for body in ({"store": False}, {"store": "false"}, {"previous_response_id": None}, {}):
        assert (await bench.post({"model": "one", "input": "Hi"} | body, RESPONSES))[0] == 200
    for method, path in (("GET", "/resp_1"), ("DELETE", "/resp_1"), ("POST", "/resp_1/cancel")):
        async with bench.session.request(method, bench.url + RESPONSES + path) as answered:
            error = (await answered.json())["error"]
            assert (answered.status, error["code"]) == (404, "responses_not_kept")
            assert "llmrun keeps no responses" in error["message"]


async def test_event_streams_are_not_buffered_by_proxies(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    _, headers, _ = await bench.post({"model": "one", "stream": True})
    assert headers["x-accel-buffering"] == "no" and headers["cache-control"] == "no-cache"


async def test_http_1_0_gets_a_plain_body(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    for extra in ("", "connection: keep-alive\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(bench.url.rpartition(":")[2]))
        body = b'{"model": "one", "stream": true}'
        head = f"POST {CHAT} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        writer.write(head.encode() + body)
        answer = await asyncio.wait_for(reader.read(), 5)  # until the connection ends
        headers, _, content = answer.partition(b"\r\n\r\n")
        assert headers.startswith(b"HTTP/1.1 200") and b"transfer-encoding" not in headers
        assert content == b"".join(CHUNKS)
        writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(bench.url.rpartition(":")[2]))
    writer.write(b"GET /v1/models HTTP/1.0\r\n\r\n")
    headers, _, content = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
    assert f"content-length: {len(content)}".encode() in headers and json.loads(content)["object"] == "list"
    writer.close()


async def test_a_connection_outlives_the_pools_of_clients(engine: Engine) -> None:
    for timeout, alive in ((0.2, False), (620.0, True)):
        async with running_ingress(keepalive_timeout=timeout) as bench:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(bench.url.rpartition(":")[2]))
            for _ in range(2):
                writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                await asyncio.wait_for(reader.readuntil(b"}"), 5)
            with_end = asyncio.create_task(reader.read(1))
            await asyncio.wait({with_end}, timeout=1)
            assert with_end.done() != alive
            writer.close()
            await asyncio.wait({with_end}, timeout=1)


async def test_a_closed_stream_frees_its_place(engine: Engine) -> None:
    limited = keys(KeyInfo(name="one-at-a-time", max_in_flight=1))
    async with running_ingress() as bench:
        bench.table(route(engine.port, max_in_flight=1), keys=limited)
        options = bearer("one-at-a-time")
        data = json.dumps({"model": "one", "hang": True}).encode()
        for number in range(50):
            async with bench.session.post(
                bench.url + CHAT, data=data, headers=options["headers"] | {"content-type": "application/json"}
            ) as stream:
                assert stream.status == 200
                await stream.content.readany()
                # aiohttp closes the connection of a response that was not read to its end
                if number == 0:
                    began = time.monotonic()
                    status, _, answer = await bench.post(**options)
                    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
                    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize(
    ("status", "body", "path", "expected"),
    [
        (
            400,
            {"error": {"message": "n must be 1 (parameter=n, value=2)", "type": "BadRequestError", "code": 400}},
            CHAT,
            (400, "n must be 1", "invalid_request_error", "invalid_request", "n"),
        ),
        (
            400,
            {
                "error": {
                    "message": "bad",
                    "type": "invalid_request_error",
                    "code": "invalid_grammar",
                    "param": "body.x",
                }
            },
            CHAT,
            (400, "bad", "invalid_request_error", "invalid_grammar", "x"),
        ),
        (404, {"message": "no such thing"}, CHAT, (404, "no such thing", "invalid_request_error", "not_found", None)),
        (
            422,
            {"detail": [{"msg": "x"}]},
            CHAT,
            (422, '[{"msg": "x"}]', "invalid_request_error", "invalid_request", None),
        ),
        (500, "Internal Server Error", CHAT, (500, "Internal Server Error", "internal_error", "engine_error", None)),
        (500, "", CHAT, (500, "the engine answered 500", "internal_error", "engine_error", None)),
        (501, {"error": "no audio"}, CHAT, (400, "no audio", "invalid_request_error", "invalid_request", None)),
        (503, {"error": {"message": "busy"}}, CHAT, (503, "busy", "service_unavailable", "engine_unavailable", None)),
    ],
)
def test_engines_errors_get_openais_codes(status: int, body: Any, path: str, expected: tuple[Any, ...]) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    error = engine_error(status, [(b"Retry-After", b"7")], raw, path)
    assert (error.status, error.message, error.kind, error.code, error.param) == expected
    assert error.retry_after == 7


TOO_LONG = (
    "This model's maximum context length is 8192 tokens. However, your prompt contains at least 8193 input tokens, "
    "which exceeds this limit even without any output tokens. (parameter=input_tokens, value=8193)"
)


def test_long_messages_of_engines_take_no_time() -> None:
    for text in ("x" + " " * 60_000 + "x", "(parameter=a, value=" * 3000):
        began = time.process_time()
        error = engine_error(400, [], json.dumps({"error": {"message": text}}).encode(), CHAT)
        assert time.process_time() - began < 0.1 and len(error.message) <= 4000


def test_a_prompt_with_too_many_characters_keeps_its_own_words() -> None:
    text = TOO_LONG.partition("contains")[0] + "contains 99 characters (more than 9, which is for 8192 input tokens)"
    body = json.dumps({"error": {"message": text}}).encode()
    assert engine_error(400, [], body, CHAT).code == "context_length_exceeded"
    assert engine_error(400, [], body, MESSAGES).message == f"prompt is too long: {text}"


@pytest.mark.parametrize("path", sorted(ALL))
def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(path: str) -> None:
    body = json.dumps({"error": {"message": TOO_LONG, "type": "BadRequestError", "code": 400}}).encode()
    error = engine_error(400, [], body, path)
    assert error.code == "context_length_exceeded" and {"8192", "8193"} <= set(error.message.split())
    shown = ErrorShape(path, "id").body(error)["error"]
    if path == MESSAGES:
        assert shown == {"type": "invalid_request_error", "message": "prompt is too long: 8193 tokens > 8192 maximum"}


async def test_every_name_of_a_model_is_listed(bench: Bench) -> None:
    bench.table(route(names=("one", "acme/one"), lora=True, adapters={"legal": "pin"}))
    async with bench.session.get(bench.url + "/v1/models") as answer:
        listed = {model["id"]: model for model in (await answer.json())["data"]}
    assert list(listed) == ["one", "acme/one", "one:legal", "acme/one:legal"]
    assert listed["acme/one"] == listed["one"] | {"id": "acme/one"}
