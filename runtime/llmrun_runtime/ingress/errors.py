"""The exception for a request that the ingress answers with an error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llmrun_runtime.asgi import error_body

# The error code while a model has no replica that can take the request.
NOT_READY = "model_not_ready"


@dataclass
class HTTPError(Exception):
    """An error response in OpenAI's shape. The endpoint's reference page lists every `code`."""

    status: int
    message: str
    code: str
    kind: str = "invalid_request_error"
    """OpenAI's `type`."""
    param: str | None = None
    retry_after: int | None = None
    """Seconds, for `Retry-After`."""
    close: bool = False
    """Whether the connection must be closed after the response."""
    cause: str = ""
    """What only the cluster's operator may see: paths, addresses, texts of exceptions. See `shown`."""

    def shown(self, *, to_operator: bool, request: str) -> HTTPError:
        """Return the error as its receiver may see it; `request` is the request's id, to be looked up in the log."""
        if not self.cause:
            return self
        more = self.cause if to_operator else f"see request {request} in the ingress log"
        return replace(self, message=f"{self.message}: {more}", cause="")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the response headers."""
        headers = [(b"retry-after", str(self.retry_after).encode())] if self.retry_after is not None else []
        return [*headers, (b"connection", b"close")] if self.close else headers

    def body(self) -> dict[str, Any]:
        """Return the response body."""
        return error_body(self.message, self.kind, self.code, self.param)
