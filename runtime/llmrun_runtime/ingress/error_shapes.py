"""The shapes of errors: OpenAI's and Anthropic's bodies, and the event that ends a stream of each API. Pure."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any

from llmrun_runtime.ingress.errors import HTTPError

MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_RESPONSE_ID = re.compile(rb'"id":\s*"(resp_[\w-]+)"')
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number":\s*(\d+)')


@dataclass
class ErrorShape:
    """How errors of one request are written: in the shape of the API that its path belongs to."""

    path: str
    request_id: str
    model: str = ""
    """As the client named it."""

    def body(self, error: HTTPError) -> dict[str, Any]:
        """Return the body of an error response."""
        if not is_anthropic(self.path):
            return error.body()
        fallback = "invalid_request_error" if error.status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(error.status, fallback)
        return {
            "type": "error",
            "error": {"type": kind, "message": error.message},
            "request_id": self.request_id,
        }

    def event(self, error: HTTPError, first: bytes = b"", last: bytes = b"") -> bytes:
        """Return the event that ends a stream, so that no client takes it for complete.

        `first`, `last`: chunks of the stream that were sent before, for the numbers of its events. An event that `last`
        leaves incomplete is ended first.
        """
        if is_anthropic(self.path):
            event = _event("error", self.body(error))
        elif self.path == RESPONSES:
            event = _event("response.failed", self._failed_response(error, first, last))
        else:
            event = b"data: " + _json(error.body()) + b"\n\n"
        return b"\n\n" + event if last and not last.endswith(b"\n\n") else event

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers with the request's id, as the API's clients read them."""
        value = self.request_id.encode("latin-1")
        return [(b"x-request-id", value)] + ([(b"request-id", value)] if is_anthropic(self.path) else [])

    def _failed_response(self, error: HTTPError, first: bytes, last: bytes) -> dict[str, Any]:
        """Return the `response.failed` event: the end of the response that has begun, or of one without output."""
        begun, numbers = _RESPONSE_ID.search(first), _SEQUENCE_NUMBER.findall(last)
        response: dict[str, Any] = {
            "id": begun[1].decode() if begun else f"resp_{self.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "failed",
            "error": {"code": error.code, "message": error.message},
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": self.model,
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
        number = int(numbers[-1]) + 1 if numbers else 0
        return {"type": "response.failed", "sequence_number": number, "response": response}


def is_anthropic(path: str) -> bool:
    """Whether the path belongs to Anthropic's API."""
    return path == MESSAGES or path.startswith(MESSAGES + "/")


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _json(data) + b"\n\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")
