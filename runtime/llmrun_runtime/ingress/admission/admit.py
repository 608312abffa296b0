"""Decides whether an authenticated inference request is admitted, and with which limits. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from llmrun.wire import KeyInfo
from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.admission.auth import can_access, check_may_wake
from llmrun_runtime.ingress.admission.output_tokens import WITHOUT_TEXT
from llmrun_runtime.ingress.admission.paths import KEPT_NOWHERE
from llmrun_runtime.ingress.admission.rate_limits import Limit, key_limits, model_limits, output_cap
from llmrun_runtime.ingress.admission.request import ParsedRequest, parse_comments, parse_max_wait, parse_priority
from llmrun_runtime.ingress.admission.target import Target, check_path, find_target
from llmrun_runtime.ingress.error_shapes import RESPONSES
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.wire.reports import PRIORITIES
from llmrun_runtime.wire.routing_table import Table


@dataclass(frozen=True)
class Admission:
    """An admitted request."""

    key: KeyInfo | None
    request: ParsedRequest
    target: Target
    max_wait: float | None
    """Seconds to wait for a replica, as the client set it; None if it did not."""
    limits: list[Limit]
    output_tokens: int
    """The tokens that it may generate; 0 if that is not known."""
    capped: tuple[str, int] | None
    """The field and the value that cap its output; None without a cap."""
    priority: int
    """In the queue: its index in PRIORITIES."""
    path: str
    comments: bool | None
    """Whether its stream may get comments while it waits, as the client set it; None if it did not."""

    @property
    def probe(self) -> bool:
        """Whether the request must not keep the model warm."""
        return self.key is not None and not self.key.wake

    @property
    def streams(self) -> bool:
        """Whether its response is an event stream."""
        return self.request.stream and self.path not in WITHOUT_TEXT


def admit(table: Table, key: KeyInfo | None, scope: Scope, request: ParsedRequest) -> Admission:
    """Admit a request whose key was authenticated before its body was read, and parsed. Raises HTTPError.

    1. The headers are valid.
    2. The model, or its adapter, exists. What the key may not use does not exist for it.
    3. The model's engine serves the path, and the request asks for nothing that llmrun does not keep.
    4. Its output is within the caps of the key and the model.
    5. The model is running, or the key may wake it.
    """
    # 1.
    max_wait = parse_max_wait(scope)
    priority = parse_priority(scope)
    if key:
        priority = min(priority, PRIORITIES.index(key.priority))
    # 2.
    target = find_target(table, request.model, partial(can_access, key))
    # 3.
    check_path(target.model, scope["path"])
    _check_kept(request, scope["path"])
    # 4.
    cap, path, output = output_cap(key, target.model), scope["path"], request.wanted.total(scope["path"])
    capped = cap.apply(path, request.wanted) if cap else None
    if capped:
        output = capped[1] * request.wanted.choices
    # 5.
    check_may_wake(key, target.model)
    limits = [*key_limits(key), *model_limits(target.model)]
    return Admission(key, request, target, max_wait, limits, output, capped, priority, path, parse_comments(scope))


def _check_kept(request: ParsedRequest, path: str) -> None:
    """Raise HTTPError (400) for a response that must be kept: what it follows may be in no replica, or in another."""
    if path == RESPONSES and request.kept:
        message = f"{request.kept!r} is not supported: {KEPT_NOWHERE}"
        raise HTTPError(400, message, "responses_not_kept", param=request.kept)
