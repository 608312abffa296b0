"""Rewrites request bodies that clients send but engines reject. Pure."""

from __future__ import annotations

from typing import Any

# Keys at the top level of a JSON schema; OpenAI's `{"name": …, "schema": …}` has none of them.
SCHEMA_KEYS = frozenset({"type", "properties", "$ref", "$defs", "anyOf", "oneOf", "allOf", "enum", "const", "items"})


def normalize(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the body in the form that engines accept; None if it needs no change.

    Ray Serve LLM's guide passes a bare schema, `"json_schema": Color.model_json_schema()`, in `response_format`;
    OpenAI's API expects it one level deeper, next to a name.
    """
    response_format = body.get("response_format")
    if not isinstance(response_format, dict) or response_format.get("type") != "json_schema":
        return None
    schema = response_format.get("json_schema")
    if not isinstance(schema, dict) or "schema" in schema or not SCHEMA_KEYS & schema.keys():
        return None
    nested = {"name": str(schema.get("title") or "answer"), "schema": schema}
    return body | {"response_format": {**response_format, "json_schema": nested}}
