"""Errors of the ingress, in OpenAI's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmrun_runtime.asgi import error_body

# The code of a Refusal: no replica answers now.
NOT_READY = "model_not_ready"


@dataclass
class HTTPError(Exception):
    """An answer in OpenAI's error shape instead of the model's."""

    status: int
    text: str
    code: str
    kind: str = "invalid_request_error"
    param: str | None = None
    retry_after: int | None = None

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        return error_body(self.text, self.kind, self.code, self.param)
