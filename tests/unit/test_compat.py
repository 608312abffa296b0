"""Request bodies that engines reject, and the detection of tool parsers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrun_runtime.engines.base import Launch, Member
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.engines.vllm.tool_parsers import tool_parser
from llmrun_runtime.ingress.admission.compat import normalize
from llmrun_runtime.ingress.admission.request import parse_request
from tests.support.ingress import Bench, Engine, route

SCHEMA = {"title": "Color", "type": "object", "properties": {"name": {"type": "string"}}}


def with_format(**format: Any) -> dict[str, Any]:
    """Return a request with this response_format."""
    return {"model": "one", "messages": [], "response_format": format}


def test_a_bare_schema_is_nested_as_in_openais_api() -> None:
    normalized = normalize(with_format(type="json_schema", json_schema=SCHEMA))
    assert normalized == with_format(type="json_schema", json_schema={"name": "Color", "schema": SCHEMA})
    assert normalize(normalized) is None
    untitled = normalize(with_format(type="json_schema", json_schema={"$ref": "#/x"}))
    assert untitled and untitled["response_format"]["json_schema"]["name"] == "answer"
    for other in (
        {"model": "one"},
        with_format(type="json_object"),
        with_format(type="json_schema"),
        with_format(type="json_schema", json_schema={"name": "x"}),
        with_format(type="json_schema", json_schema="x"),
        {"response_format": "json"},
    ):
        assert normalize(other) is None
    assert parse_request(json.dumps(with_format(type="json_object")).encode()).normalized == b""


async def test_the_engine_gets_the_normalized_body(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    status, _, _ = await bench.post(with_format(type="json_schema", json_schema=SCHEMA))
    (request,) = engine.requests
    assert status == 200
    body = await request.body()
    assert json.loads(body)["response_format"]["json_schema"] == {"name": "Color", "schema": SCHEMA}
    assert request.headers.get("content-length") in (None, str(len(body)))


def model(folder: Path, template: Any = None, **config: Any) -> Path:
    """Create a model's folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_the_tool_parser_is_detected_from_the_chat_template(tmp_path: Path) -> None:
    hermes = "{% if tools %}<tool_call>{% endif %}"
    assert tool_parser(model(tmp_path / "a", hermes)) == "hermes"
    assert tool_parser(model(tmp_path / "b", hermes + "<function=")) == "qwen3_coder"
    assert tool_parser(model(tmp_path / "c", [{"name": "default", "template": ""}, {"template": hermes}])) == "hermes"
    assert tool_parser(model(tmp_path / "d", "tools", model_type="gpt_oss")) == "openai"
    assert tool_parser(model(tmp_path / "e", "<tool_call>")) == "", "it has no tools"
    assert tool_parser(model(tmp_path / "f")) == "" == tool_parser(tmp_path / "nowhere")
    (tmp_path / "f" / "chat_template.jinja").write_text("{% if tools %}[TOOL_CALLS]{% endif %}")
    assert tool_parser(tmp_path / "f") == "mistral"
    (tmp_path / "a" / "config.json").write_text("no JSON")
    assert tool_parser(tmp_path / "a") == "hermes"


@pytest.mark.parametrize(
    ("args", "task", "enabled"),
    [
        ({}, "auto", True),
        ({"tool_call_parser": "pythonic"}, "auto", False),
        ({"enable_auto_tool_choice": False}, "auto", False),
        ({"chat_template": "./mine.jinja"}, "auto", False),
        ({}, "embed", False),
        ({"runner": "pooling"}, "auto", False),
    ],
)
def test_tool_calls_are_enabled_unless_configured_otherwise(
    tmp_path: Path, args: dict[str, Any], task: str, enabled: bool
) -> None:
    weights = model(tmp_path / "m", "{% if tools %}<tool_call>{% endif %}")
    launch = Launch(("m",), str(weights), (Member("n", "127.0.0.1"),), args, "python", task=task)
    flags = get_engine("vllm").arguments(launch)
    assert (" ".join(flags).count("--enable-auto-tool-choice --tool-call-parser hermes") == 1) == enabled
    assert ("--runner" in flags) == (task == "embed" or "runner" in args)
