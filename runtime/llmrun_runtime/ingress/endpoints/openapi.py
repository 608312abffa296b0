"""The ingress's OpenAPI document: its paths, and how its own answers look. Bodies are the engines' business."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import llmrun

FORMS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
REFUSALS = {
    400: "The request cannot be read, or the engine refuses it.",
    401: "There are API keys, and none of them came with the request.",
    403: "The key is for other models.",
    404: "There is no such model, or it has no such path; the message names those that there are.",
    413: "The body is too large.",
    429: "A limit is reached, or the queue is full; `Retry-After` says when to come back.",
    500: "The ingress or the engine failed.",
    503: "No replica answers now; the message says why.",
    504: "A deadline that was set is over.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {},
                "param": {"type": ["string", "null"]},
            },
        }
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "llmrun"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "llmrun": {"type": "object", "required": ["state", "app", "version", "aliases", "paths"]},
    },
}
_LIST = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    },
}


def openapi(paths: Iterable[str]) -> dict[str, Any]:
    """The document, for these inference paths."""
    found: dict[str, Any] = {
        "/health": {"get": _operation("Whether the ingress lives", {"type": "object"})},
        "/v1/models": {"get": _operation("All models", _ref("Models"))},
        "/v1/models/{id}": {"get": _operation("One model", _ref("Model"))},
    }
    found["/v1/models/{id}"]["get"]["parameters"] = [
        {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    for path in sorted(paths):
        operation = _operation("Answered by the model's engine", {})
        body = {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}}
        kind = "multipart/form-data" if path in FORMS else "application/json"
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": body}}}
        found[path] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmrun", "version": llmrun.__version__},
        "paths": found,
        "security": [{}, {"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR, "Model": _MODEL, "Models": _LIST},
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _operation(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    refusals = {
        str(status): {"description": text, "content": {"application/json": {"schema": _ref("Error")}}}
        for status, text in REFUSALS.items()
    }
    return {"summary": summary, "responses": {"200": {"description": "Well.", "content": content}, **refusals}}
