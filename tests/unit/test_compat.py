"""What clients write that engines do not take; and which tool calls a model writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrun_runtime.engines.base import Launch, Member
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.engines.vllm.tool_parsers import BY_TEMPLATE, BY_TYPE, tool_parser
from llmrun_runtime.ingress.admission.compat import mended
from llmrun_runtime.ingress.admission.request import read_request
from tests.support.ingress import Bench, Engine, route

SCHEMA = {"title": "Color", "type": "object", "properties": {"name": {"type": "string"}}}


def wanting(**format: Any) -> dict[str, Any]:
    """A request with that response_format."""
    return {"model": "one", "messages": [], "response_format": format}


def test_a_bare_schema_is_put_where_openais_api_has_it() -> None:
    found = mended(wanting(type="json_schema", json_schema=SCHEMA))
    assert found == wanting(type="json_schema", json_schema={"name": "Color", "schema": SCHEMA})
    assert mended(found) is None
    untitled = mended(wanting(type="json_schema", json_schema={"$ref": "#/x"}))
    assert untitled and untitled["response_format"]["json_schema"]["name"] == "answer"
    for other in (
        {"model": "one"},
        wanting(type="json_object"),
        wanting(type="json_schema"),
        wanting(type="json_schema", json_schema={"name": "x"}),
        wanting(type="json_schema", json_schema="x"),
        {"response_format": "json"},
    ):
        assert mended(other) is None
    assert read_request(json.dumps(wanting(type="json_object")).encode()).mended == b""


async def test_the_engine_gets_the_mended_body(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    status, _, _ = await bench.ask(wanting(type="json_schema", json_schema=SCHEMA))
    (asked,) = engine.asked
    assert status == 200
    body = await asked.body()
    assert json.loads(body)["response_format"]["json_schema"] == {"name": "Color", "schema": SCHEMA}
    assert asked.headers.get("content-length") in (None, str(len(body)))


def model(folder: Path, template: Any = None, **config: Any) -> Path:
    """A folder like a model's."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_a_models_tool_parser_is_told_by_its_template(tmp_path: Path) -> None:
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on its import
def test_every_parser_is_one_of_vllms() -> None:
    from vllm.tool_parsers import ToolParserManager

    known = set(ToolParserManager.list_registered())
    assert {*BY_TYPE.values(), *(name for _, name in BY_TEMPLATE)} <= known


@pytest.mark.parametrize(
    ("args", "task", "has"),
    [
        ({}, "auto", True),
        ({"tool_call_parser": "pythonic"}, "auto", False),
        ({"enable_auto_tool_choice": False}, "auto", False),
        ({"chat_template": "./mine.jinja"}, "auto", False),
        ({}, "embed", False),
        ({"runner": "pooling"}, "auto", False),
    ],
)
def test_tools_are_switched_on_unless_somebody_says_otherwise(
    tmp_path: Path, args: dict[str, Any], task: str, has: bool
) -> None:
    weights = model(tmp_path / "m", "{% if tools %}<tool_call>{% endif %}")
    launch = Launch(("m",), str(weights), (Member("n", "127.0.0.1"),), args, "python", task=task)
    flags = get_engine("vllm").arguments(launch)
    assert (" ".join(flags).count("--enable-auto-tool-choice --tool-call-parser hermes") == 1) == has
    assert ("--runner" in flags) == (task == "embed" or "runner" in args)
