"""The record of one inference request, for metrics and the log."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.error_shapes import ErrorShape
from llmrun_runtime.ingress.errors import HTTPError

log = logging.getLogger("llmrun.ingress")
# Nothing that could be taken for another field of the log.
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass
class RequestRecord:
    """One request. `status` is 0 until the response starts; `path` is "" for requests that are not for a model."""

    id: str
    shape: ErrorShape
    """How its errors are written."""
    model: str = ""
    adapter: str = ""
    """The adapter's label in metrics."""
    key: str = ""
    operator: bool = False
    """Whether the sender may see causes: an admin, or, while no key is needed, whoever can connect."""
    path: str = ""
    status: int = 0
    began: float = field(default_factory=time.monotonic)
    first_byte: float = 0
    streamed: bool = False
    """Whether the first byte belongs to an event of an answer."""
    rate_limit_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    """`x-ratelimit-*`, for the response."""

    def __str__(self) -> str:
        first = f" first byte {self.first_byte - self.began:.3f} s," if self.first_byte else ""
        took = time.monotonic() - self.began
        key = f" key {self.key}" if self.key else ""
        return f"{self.id}{key} {self.model or '-'} {self.path} {self.status or 'left'},{first} {took:.3f} s"

    def shown(self, error: HTTPError) -> HTTPError:
        """Return the error as this request's sender may see it, and log what it may not see."""
        if error.cause and not self.operator:
            log.info("%s %s: %s: %s", self.id, self.key, error.message, error.cause)
        return error.shown(to_operator=self.operator, request=self.id)


def new_record(scope: Scope) -> RequestRecord:
    """Return a record with the client's `x-request-id`, or a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    number = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return RequestRecord(number, ErrorShape(scope["path"], number))
