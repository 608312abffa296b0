"""Rewrites request bodies that clients send but engines reject. Pure."""

from __future__ import annotations

from typing import Any

# Keys at the top level of a JSON schema; OpenAI's `{"name": …, "schema": …}` has none of them.
SCHEMA_KEYS = frozenset({"type", "properties", "$ref", "$defs", "anyOf", "oneOf", "allOf", "enum", "const", "items"})


def normalize(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the body in the form that engines accept; None if it needs no change."""
    changed = _without_null_names(_with_nested_schema(body))
    return None if changed is body else changed


def _with_nested_schema(body: dict[str, Any]) -> dict[str, Any]:
    """Nest a bare schema in `response_format`.

    Ray Serve LLM's guide passes `"json_schema": Color.model_json_schema()`; OpenAI's API expects it one level deeper,
    next to a name.
    """
    response_format = body.get("response_format")
    if not isinstance(response_format, dict) or response_format.get("type") != "json_schema":
        return body
    schema = response_format.get("json_schema")
    if not isinstance(schema, dict) or "schema" in schema or not SCHEMA_KEYS & schema.keys():
        return body
    nested = {"name": str(schema.get("title") or "answer"), "schema": schema}
    return body | {"response_format": {**response_format, "json_schema": nested}}


def _without_null_names(body: dict[str, Any]) -> dict[str, Any]:
    """Leave out `"name": null` of messages, which clients that serialize optional fields send, and OpenAI accepts."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not any(map(_has_null_name, messages)):
        return body
    kept = [
        {key: value for key, value in message.items() if key != "name"} if _has_null_name(message) else message
        for message in messages
    ]
    return body | {"messages": kept}


def _has_null_name(message: Any) -> bool:
    return isinstance(message, dict) and message.get("name", "") is None
