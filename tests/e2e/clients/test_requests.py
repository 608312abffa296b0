"""A table of requests as they are on the wire, and the right answers. Add a row for each request that went wrong."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.support.cluster import Home

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT, EMBEDDINGS = "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings"
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
LONG = "hello " * 20_000
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def image(width: int, height: int) -> str:
    """Return the data URL of a black PNG with one bit per pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row, compressor = b"\0" + bytes((width + 7) // 8), zlib.compressobj(9)
    pixels = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def look(url: str) -> dict[str, Any]:
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "eyes", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}


@dataclass(frozen=True)
class Row:
    """One request, and what its answer must be."""

    name: str
    path: str
    body: Any
    status: int = 200
    code: str = ""
    """OpenAI's `code`, or Anthropic's `type`, of the error."""
    says: str = ""
    """A part of the error's message, or of the answer."""
    param: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def chat(name: str, **more: Any) -> Row:
    """Return a row for a chat with `talker`; `more` has fields of the body and of the row."""
    row = {key: more.pop(key) for key in ("status", "code", "says", "param") if key in more}
    return Row(name, CHAT, {"model": "talker", "max_tokens": 4, "messages": HI} | more, **row)


def bad(name: str, says: str, param: str = "", **more: Any) -> Row:
    """Return a row for a chat that the engine refuses, in one sentence."""
    return chat(name, status=400, code="invalid_request", says=says, param=param, **more)


def asks(role: str, content: Any) -> list[dict[str, Any]]:
    return [*HI, {"role": role, "content": content}]


def longs() -> list[Row]:
    both, code = "8192", "context_length_exceeded"
    return [
        chat("long chat", messages=[{"role": "user", "content": LONG}], status=400, code=code, says=both),
        Row("long prompt", COMPLETIONS, {"model": "talker", "prompt": LONG}, 400, code, "8193", "prompt"),
        Row("long input", RESPONSES, {"model": "talker", "input": LONG}, 400, code, "8193", "input"),
        Row("long text", EMBEDDINGS, {"model": "embedder", "input": LONG}, 400, code, "2049", "input"),
        Row(
            "long message",
            MESSAGES,
            {"model": "talker", "max_tokens": 8, "messages": [{"role": "user", "content": LONG}]},
            *(400, "invalid_request_error", "prompt is too long: 8193 tokens > 8192 maximum"),
        ),
        Row(
            "too many tokens",
            MESSAGES,
            {"model": "talker", "max_tokens": 100_000, "messages": HI},
            *(400, "invalid_request_error", "max_tokens: 100000 > 8192"),
        ),
    ]


def paths() -> list[Row]:
    body = {"model": "talker", "max_tokens": 2, "messages": HI}
    others = ("/chat/completions", "/v1/v1/chat/completions", CHAT + "/", "/v1//chat/completions", "/openai" + CHAT)
    azure = "/openai/deployments/talker/chat/completions?api-version=2024-10-21"
    return [
        *(Row(path, path, body, says="chat.completion") for path in others),
        Row("azure", azure, {"max_tokens": 2, "messages": HI}, says="chat.completion"),
        Row("azure, another model", azure, body | {"model": "gpt-4o"}, says='"model":"talker"'),
        Row("beta", MESSAGES + "?beta=true", body, says='"type":"message"', headers={"anthropic-beta": "x-2025"}),
        Row("unknown path", "/v1/chat/completion", body, 404, "path_not_found", f"Did you mean {CHAT}?"),
        Row("unknown model", CHAT, body | {"model": "nobody"}, 404, "model_not_found", "nobody", "model"),
        Row("unknown model, Anthropic", MESSAGES, body | {"model": "nobody"}, 404, "not_found_error", "nobody"),
        Row("by alias", CHAT, body | {"model": "acme/talker"}, says="chat.completion"),
    ]


def encodings() -> list[Row]:
    body = json.dumps({"model": "talker", "max_tokens": 2, "messages": HI}).encode()
    return [
        Row("gzip", CHAT, gzip.compress(body), says="chat.completion", headers={"content-encoding": "gzip"}),
        Row("deflate", CHAT, zlib.compress(body), says="chat.completion", headers={"content-encoding": "deflate"}),
        Row("br", CHAT, body, 415, "unsupported_encoding", "gzip, deflate, zstd", headers={"content-encoding": "br"}),
        Row("broken gzip", CHAT, body, 400, "invalid_encoding", headers={"content-encoding": "gzip"}),
    ]


def surrogates() -> list[Row]:
    half, code = "a\ud800b", "invalid_text"
    row = {"status": 400, "code": code}
    return [
        chat(
            "surrogate in a message", messages=[{"role": "user", "content": half}], param="messages[0].content", **row
        ),
        chat("surrogate in stop", stop=half, param="stop", **row),
        chat("surrogate in a tool", tools=[{"type": "function", "function": {"name": half}}], **row),
        Row("surrogate in model", CHAT, {"model": half, "messages": HI}, 400, code, param="model"),
        Row("surrogate in input", EMBEDDINGS, {"model": "embedder", "input": half}, 400, code, param="input"),
        chat(
            "surrogate beside a bare schema", response_format=BARE, messages=[{"role": "user", "content": half}], **row
        ),
    ]


EMPTY = {"type": "message", "id": "", "role": "assistant", "status": "completed", "content": []}
BARE = {"type": "json_schema", "json_schema": {"type": "object", "properties": {}}}
NOT_KEPT = (400, "responses_not_kept", "llmrun keeps no responses")
TABLE = [
    *longs(),
    *paths(),
    *encodings(),
    *surrogates(),
    # what OpenAI takes
    chat("name is null", messages=[{"role": "user", "content": "Hi", "name": None}]),
    chat("optional fields are null", stop=None, tools=None, tool_choice=None, user=None, n=None, response_format=None),
    chat("unknown fields", store=True, metadata={"a": "b"}, service_tier="auto", verbosity="low"),
    chat("assistant without content", messages=[*HI, {"role": "assistant", "content": None}, *HI]),
    chat("developer", messages=[{"role": "developer", "content": "Be brief."}, *HI]),
    # one sentence that names the field
    Row("no messages", CHAT, {"model": "talker"}, 400, "invalid_request", "'messages' is required", "messages"),
    bad(
        "tool without content",
        "'messages[2].content' should be",
        "messages[2].content",
        messages=[
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "a", "content": None},
        ],
    ),
    bad(
        "arguments are an object",
        "'messages[1].tool_calls[0].function.arguments' should be a valid string",
        messages=[
            *HI,
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": {"x": 1}}}]},
        ],
    ),
    bad("content is a number", "'messages[1].content' should be", messages=asks("user", 3)),
    bad("part without text", "'content[0].text' is required", messages=asks("user", [{"type": "text"}])),
    bad("temperature is a word", "'temperature' should be a valid number", "temperature", temperature="hot"),
    bad("tool without a function", "'tools[0].function' is required", tools=[{"type": "function"}]),
    bad(
        "invalid schema",
        "Invalid type: thing",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}},
    ),
    Row("no input", RESPONSES, {"model": "talker"}, 400, "invalid_request", "'input' is required", "input"),
    Row(
        "input without content",
        RESPONSES,
        {"model": "talker", "input": [{"role": "user"}]},
        400,
        "invalid_request",
        "'input[0].content' is required",
    ),
    Row(
        "assistant with empty content",
        RESPONSES,
        {"model": "talker", "input": [EMPTY], "max_output_tokens": 4},
        *(400, "invalid_request", "the engine cannot read this request"),
    ),
    Row(
        "no max_tokens",
        MESSAGES,
        {"model": "talker", "messages": HI},
        400,
        "invalid_request_error",
        "'max_tokens' is required",
    ),
    Row("no text", EMBEDDINGS, {"model": "embedder"}, 400, "invalid_request", "'input' is required"),
    # media
    Row("bomb", CHAT, look(image(20_000, 20_000)), 400, "invalid_request", "exceeds limit"),
    Row("local file", CHAT, look("file:///etc/passwd"), 400, "invalid_request", "local files are not read"),
    Row("no image", CHAT, look("data:image/png;base64,aGVsbG8="), 400, "invalid_request"),
    Row("image for a text model", CHAT, look(image(8, 8)) | {"model": "talker"}, 400, "invalid_request"),
    # others
    Row(
        "tools without a parser",
        CHAT,
        {"model": "eyes", "messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]},
        *(400, "tools_not_enabled", '"tool_call_parser": "hermes"', "tools"),
    ),
    Row("no template", CHAT, {"model": "plain", "messages": HI}, 400, "no_chat_template", "engine_args"),
    Row(
        "no template, Anthropic",
        MESSAGES,
        {"model": "plain", "max_tokens": 4, "messages": HI},
        400,
        "invalid_request_error",
        "engine_args",
    ),
    Row(
        "prompt without template",
        COMPLETIONS,
        {"model": "plain", "prompt": "Hi", "max_tokens": 2},
        says="text_completion",
    ),
    Row(
        "previous response", RESPONSES, {"model": "talker", "input": "Hi", "previous_response_id": "resp_1"}, *NOT_KEPT
    ),
    Row("store", RESPONSES, {"model": "talker", "input": "Hi", "store": True}, *NOT_KEPT),
    Row("background", RESPONSES, {"model": "talker", "input": "Hi", "background": True}, *NOT_KEPT),
    Row("cancel", RESPONSES + "/resp_1/cancel", {}, 404, "responses_not_kept", "llmrun keeps no responses"),
    Row(
        "embeddings with stream", EMBEDDINGS, {"model": "embedder", "input": "Hi", "stream": True}, says='"embedding":['
    ),
    Row("stream is 1", CHAT, {"model": "talker", "messages": HI, "max_tokens": 2, "stream": 1}, says="data: [DONE]"),
    Row("count", COUNT, {"model": "talker", "messages": HI}, says="input_tokens"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name.replace(" ", "-"))
def test_the_answer_is_right(http: httpx.Client, row: Row) -> None:
    content = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
    answer = http.post(row.path, content=content, headers={"content-type": "application/json", **row.headers})
    assert (answer.status_code, row.says in answer.text.replace('\\"', '"')) == (row.status, True), answer.text
    if row.status == 200:
        return
    body, error = answer.json(), answer.json()["error"]
    if row.path.startswith(MESSAGES):
        assert (body["type"], error["type"]) == ("error", row.code)
        assert body["request_id"] == answer.headers["request-id"]
    else:
        assert (error["code"], row.param or error["param"]) == (row.code, error["param"]), error
        assert error["type"] in ("invalid_request_error", "server_error"), error
    assert "\n" not in error["message"] and "validation error" not in error["message"]


def test_every_name_is_listed(http: httpx.Client) -> None:
    listed = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert listed["acme/talker"] == listed["talker"] | {"id": "acme/talker"}


def test_a_large_upload_gets_a_readable_refusal(served: Home, http: httpx.Client) -> None:
    """curl sends `Expect: 100-continue`, and closes when it reads the refusal."""
    answer = http.post(
        CHAT, content=bytes(40 * 2**20), headers={"expect": "100-continue", "content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
