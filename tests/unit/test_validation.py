"""Validation errors of engines in one sentence: pydantic's, of vLLM's own request classes."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData

from llmrun_runtime.engines.vllm.validation import explain

HI = {"role": "user", "content": "Hi"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from importing torch


def refused(cls: type, body: Any) -> list[dict[str, Any]]:
    """Return the errors, as FastAPI reports them."""
    with pytest.raises(ValidationError) as error:
        TypeAdapter(cls).validate_python(body)
    return [{**each, "loc": ("body", *each["loc"])} for each in error.value.errors()]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "'messages' is required"),
        ({"messages": "Hi"}, "'messages' should be a valid list"),
        ({"messages": ["a"]}, "'messages[0]' should be a valid dictionary"),
        ({"messages": [HI], "temperature": "hot"}, "'temperature' should be a valid number"),
        ({"messages": [HI], "seed": 2**70}, "'seed' should be less than or equal to"),
        ({"messages": [HI, {"role": "tool", "tool_call_id": "a", "content": None}]}, "'messages[1].content' should be"),
        ({"messages": [{"role": "user", "content": 3}]}, "'messages[0].content' should be a valid string"),
        ({"messages": [HI | {"name": 3}]}, "'messages[0].name' should be a valid string"),
        ({"messages": [HI], "tools": [{"type": "function"}]}, "'tools[0].function' is required"),
        (
            {
                "messages": [
                    HI,
                    {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": {}}}]},
                ]
            },
            "'messages[1].tool_calls[0].function.arguments' should be a valid string",
        ),
    ],
)
def test_chat_requests(body: dict[str, Any], message: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    said, field = explain(refused(ChatCompletionRequest, body), body)
    assert said.startswith(message) and "\n" not in said
    assert field == message.split("'")[1]


def test_the_member_of_a_union_that_was_meant() -> None:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    body = {"model": "m", "input": [{"role": "user"}]}
    errors = refused(ResponsesRequest, body)
    assert len(errors) > 100 and explain(errors, body) == ("'input[0].content' is required", "input[0].content")


def test_many_errors_take_no_time() -> None:
    """vLLM's API server does nothing else meanwhile."""
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    body = {"model": "m", "input": [{"role": "user"}] * 300}
    errors = refused(ResponsesRequest, body)
    assert len(errors) > 10_000
    began = time.process_time()
    assert explain(errors, body)[0].startswith("'input[")
    assert time.process_time() - began < 0.5


def test_fields_of_forms_are_named() -> None:
    form = FormData([("model", "m"), ("temperature", "hot")])
    missing = {"type": "missing", "loc": ("body", "file"), "msg": "Field required"}
    assert explain([missing], form) == ("'file' is required", "file")
    invalid = {"type": "float_parsing", "loc": ("body", "temperature"), "msg": "Input should be a valid number"}
    assert explain([invalid], form) == ("'temperature' should be a valid number", "temperature")


def test_without_the_body() -> None:
    """vLLM validates parts of messages when it reads them, and then only has the list."""
    from openai.types.chat import ChatCompletionContentPartParam

    with pytest.raises(ValidationError) as error:
        TypeAdapter(list[ChatCompletionContentPartParam]).validate_python([{"type": "text"}])
    assert explain([dict(each) for each in error.value.errors()])[0] == "'content[0].text' is required"
    assert explain([], {}) == ("the request is not valid", "")
    own = {"type": "value_error", "loc": ("body",), "msg": "Value error, n must be 1"}
    assert explain([own], {"n": 2}) == ("n must be 1", "")
