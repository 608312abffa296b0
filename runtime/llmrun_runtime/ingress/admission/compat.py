"""What clients write that engines do not take, put as they do. Pure."""

from __future__ import annotations

from typing import Any

# Some of these a JSON schema has at its top; OpenAI's `{"name": …, "schema": …}` has none.
OF_SCHEMAS = frozenset({"type", "properties", "$ref", "$defs", "anyOf", "oneOf", "allOf", "enum", "const", "items"})


def mended(body: dict[str, Any]) -> dict[str, Any] | None:
    """The body as engines take it; None if it is so already.

    Ray Serve LLM's guide gives `response_format` a bare schema, `"json_schema": Color.model_json_schema()`; OpenAI's
    API has it one level deeper, beside a name.
    """
    wanted = body.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return None
    schema = wanted.get("json_schema")
    if not isinstance(schema, dict) or "schema" in schema or not OF_SCHEMAS & schema.keys():
        return None
    nested = {"name": str(schema.get("title") or "answer"), "schema": schema}
    return body | {"response_format": {**wanted, "json_schema": nested}}
