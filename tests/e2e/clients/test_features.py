"""Requests beyond plain text: tools, JSON schemas, embeddings and scores."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.support.cluster import SMOLLM2, Home, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


class Capital(BaseModel):
    """The structured output that the model must produce."""

    city: str
    country: str


def test_responses_follow_a_schema(client: Any) -> None:
    messages = [{"role": "user", "content": "Which city is the capital of France? Answer as JSON."}]
    parsed = client.chat.completions.parse(
        model="talker", messages=messages, response_format=Capital, temperature=0, max_tokens=60
    )
    assert parsed.choices[0].message.parsed
    schema = {"name": "capital", "schema": Capital.model_json_schema(), "strict": True}
    stream = client.chat.completions.create(
        model="talker",
        messages=messages,
        response_format={"type": "json_schema", "json_schema": schema},
        temperature=0,
        max_tokens=60,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert Capital.model_validate_json(text) == parsed.choices[0].message.parsed


@pytest.mark.parametrize("bare", [False, True])
def test_every_response_parses(client: Any, bare: bool) -> None:
    """`bare` sends only the schema, as in Ray Serve LLM's guide. Half of the requests are streamed."""
    schema: dict[str, Any] = Capital.model_json_schema()
    # At temperature 1, so small a model may never close a string, so the lengths are bounded.
    for field in schema["properties"].values():
        field["maxLength"] = 20
    requested = schema if bare else {"name": "capital", "schema": schema}

    def ask(number: int) -> str:
        messages = [
            {"role": "user", "content": f"Which city is the capital of country number {number}? Answer as JSON."}
        ]
        answer = client.chat.completions.create(
            model="talker",
            messages=messages,
            response_format={"type": "json_schema", "json_schema": requested},
            max_tokens=120,
            seed=number,
            stream=bool(number % 2),
        )
        if number % 2:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return str(answer.choices[0].message.content)

    with ThreadPoolExecutor(16) as pool:
        for text in pool.map(ask, range(12)):
            Capital.model_validate_json(text)


def test_structured_output_as_json_regex_and_choice(client: Any) -> None:
    messages = [{"role": "user", "content": "Is Paris in France?"}]

    def text(**more: Any) -> str:
        answer = client.chat.completions.create(model="talker", messages=messages, temperature=0, max_tokens=60, **more)
        return str(answer.choices[0].message.content)

    assert text(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}) in ("yes", "no")
    assert re.fullmatch(r"[a-f]{3}-\d{2}", text(extra_body={"structured_outputs": {"regex": r"[a-f]{3}-\d{2}"}}))
    shape = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    assert json.loads(text(extra_body={"structured_outputs": {"json": shape}})).keys() == {"sure"}
    started = text(response_format={"type": "json_object"}).lstrip()
    assert started.startswith("{"), "the model may not come to an end, but it is JSON as far as it goes"


def test_tools_are_enabled_if_the_chat_template_supports_them(
    cluster: Home, tmp_path: Path, client: openai.OpenAI
) -> None:
    """Request `client` so that these engines do not start at the same time."""
    weights = tmp_path / "weights"
    shutil.copytree(SMOLLM2, weights, copy_function=os.link)
    template = (weights / "chat_template.jinja").read_text()
    (weights / "chat_template.jinja").unlink()  # a link to the original
    (weights / "chat_template.jinja").write_text("{% if tools %}<tool_call>{% endif %}" + template)
    text = f"@llm({str(weights)!r}, cpus=0.2, idle_timeout=600)\nclass Caller: ...\n"
    cluster.ok("deploy", write_app(tmp_path / "caller" / "app.py", text))
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    body = {
        "model": "caller",
        "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
        "tools": [{"type": "function", "function": function}],
        "max_tokens": 8,
    }
    for choice in ("auto", "none"):
        answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body | {"tool_choice": choice}, timeout=60)
        assert answer.status_code == 200, answer.text
    cluster.ok("delete", "caller", "--yes")


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called(client: Any, stream: bool) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    function = {"name": "weather", "description": "The weather in a city.", "parameters": parameters}
    more = {"tools": [{"type": "function", "function": function}], "temperature": 0, "max_tokens": 100}
    choice = {"type": "function", "function": {"name": "weather"}}
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    answer = client.chat.completions.create(
        model="talker", messages=messages, tool_choice=choice, stream=stream, **more
    )
    if stream:
        calls = [call for chunk in answer for call in chunk.choices[0].delta.tool_calls or ()]
        name, arguments = calls[0].function.name, "".join(call.function.arguments or "" for call in calls)
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert name == "weather" and "Paris" in str(json.loads(arguments))


def test_embeddings_and_scores(cluster: Home, client: openai.OpenAI) -> None:
    texts = ["a small town", "a small town", "the theory of numbers"]
    result = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
    one, same, other = (row.embedding for row in result.data)
    assert math.isclose(math.hypot(*one), 1, rel_tol=1e-3) and result.usage.prompt_tokens > 0

    def distance(left: list[float], right: list[float]) -> float:
        return math.dist(left, right)

    assert distance(one, same) < 1e-2 < distance(one, other)
    body = {"model": "embedder", "input": texts[:1], "encoding_format": "base64"}
    raw = httpx.post(f"{cluster.url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    data = base64.b64decode(raw)
    assert distance(list(struct.unpack(f"<{len(data) // 4}f", data)), one) < 1e-2
    body = {"model": "embedder", "text_1": texts[0], "text_2": texts[1:]}
    scores = [row["score"] for row in httpx.post(f"{cluster.url}/score", json=body).json()["data"]]
    assert scores[0] > scores[1]
    body = {"model": "embedder", "query": texts[0], "documents": texts[1:]}
    ranked = httpx.post(f"{cluster.url}/rerank", json=body).json()["results"]
    assert [row["index"] for row in ranked] == [0, 1]
    with pytest.raises(
        openai.NotFoundError, match=r"embedder does not support /v1/chat/completions. Available: .*/v1/embeddings"
    ):
        client.chat.completions.create(model="embedder", messages=[{"role": "user", "content": "Hi"}])
