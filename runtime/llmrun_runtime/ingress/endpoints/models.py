"""`GET /v1/models`: models and their adapters in OpenAI's format, from memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from itertools import islice, product
from typing import Any

from llmrun_runtime.ingress.admission.target import Visibility, listed_adapters
from llmrun_runtime.wire.routing_table import ModelRoute

MODELS = "/v1/models"
# Entries to encode before other requests get their turn: 1 ms.
BATCH = 500


async def list_models(models: Iterable[ModelRoute], visible: Visibility) -> bytes:
    """Return the complete response body."""
    models = list(models)
    entries = _entries(models, visible)
    chunks: list[str] = []
    while batch := list(islice(entries, BATCH)):
        if shown := [entry for entry in batch if entry]:
            chunks.append(json.dumps(shown, ensure_ascii=False)[1:-1])
        await asyncio.sleep(0)
    return b'{"object": "list", "data": [' + ", ".join(chunks).encode() + b"]}"


def _entries(models: list[ModelRoute], visible: Visibility) -> Iterator[dict[str, Any] | None]:
    """Yield models, then adapters, by each of their names.

    Adapters can be thousands: they have only OpenAI's fields and the parent.

    Yields None for each entry that is not visible, because checking it takes time, too.
    """
    for model in models:
        for name in model.names:
            yield describe(model, name) if visible(model) else None
    for model in models:
        for name, adapter in product(model.names, listed_adapters(model)):
            shown = visible(model, adapter)
            yield entry(f"{name}:{adapter}", model.created) | {"parent": model.name} if shown else None


def describe(model: ModelRoute, name: str) -> dict[str, Any]:
    """Return a model, or one of its adapters, with llmrun's own fields."""
    extra: dict[str, Any] = {
        "state": model.state,
        "app": model.app,
        "version": model.version,
        "aliases": list(model.names[1:]),
        "paths": sorted(model.paths),
    }
    if model.max_model_len:
        extra["max_model_len"] = model.max_model_len
    parent = {"parent": model.name} if ":" in name else {}
    return entry(name, model.created) | {"llmrun": extra} | parent


def entry(name: str, created: int) -> dict[str, Any]:
    """Return a model in OpenAI's format; `created` in Unix seconds."""
    return {"id": name, "object": "model", "created": created, "owned_by": "llmrun"}
