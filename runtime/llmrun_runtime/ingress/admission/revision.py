"""Resolves adapter revisions that requests name (`model:adapter@revision`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from llmrun_runtime.ingress.admission.target import Target
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.wire.reports import AdapterRevision

Resolver = Callable[[str, str], Awaitable[AdapterRevision]]
"""Asks control for the pin of a model's `adapter@revision`."""


async def resolve_pin(target: Target, resolver: Resolver) -> Target:
    """Return the target with its pin; calls control for a revision that was not used recently. Raises HTTPError."""
    if target.pin or not target.adapter:
        return target
    resolved = await resolver(target.model.name, target.adapter)
    name = f"{target.model.name}:{target.adapter}"
    if resolved.missing:
        raise HTTPError(404, f"model {name!r} not found: {resolved.error}", "model_not_found", param="model")
    if not resolved.pin:
        message = f"cannot resolve {name}: {resolved.error}"
        raise HTTPError(503, message, "adapters_unknown", "service_unavailable", param="model", retry_after=5)
    return replace(target, pin=resolved.pin)
