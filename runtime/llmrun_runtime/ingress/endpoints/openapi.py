"""The ingress's OpenAPI document: its paths and its own responses. The engines define the bodies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import llmrun

FORMS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
ERRORS = {
    400: "The request is invalid, or the engine rejected it.",
    401: "The API key is missing, invalid or expired.",
    403: "The API key has no access to this model.",
    404: "The model was not found, or does not support this path; the message lists what is available.",
    413: "The request body is too large.",
    429: "A rate limit is reached, or the queue is full; retry after `Retry-After` seconds.",
    500: "The ingress or the engine failed.",
    503: "No replica is available; the message has the reason.",
    504: "The request timed out.",
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
    """Return the document for these inference paths."""
    operations: dict[str, Any] = {
        "/health": {"get": _operation("Liveness of the ingress", {"type": "object"})},
        "/ready": {"get": _operation("Readiness of the ingress", {"type": "object"})},
        "/v1/models": {"get": _operation("All models", _ref("Models"))},
        "/v1/models/{id}": {"get": _operation("One model", _ref("Model"))},
    }
    operations["/v1/models/{id}"]["get"]["parameters"] = [
        {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    for path in sorted(paths):
        operation = _operation("Served by the model's engine", {})
        body = {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}}
        kind = "multipart/form-data" if path in FORMS else "application/json"
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": body}}}
        operations[path] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmrun", "version": llmrun.__version__},
        "paths": operations,
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
    errors = {
        str(status): {"description": text, "content": {"application/json": {"schema": _ref("Error")}}}
        for status, text in ERRORS.items()
    }
    return {"summary": summary, "responses": {"200": {"description": "OK", "content": content}, **errors}}
