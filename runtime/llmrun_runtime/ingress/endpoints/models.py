"""`GET /v1/models`: models and their adapters as OpenAI lists them, from memory, however many there are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from llmrun_runtime.ingress.admission.admit import Visibility, listed_adapters
from llmrun_runtime.wire.routing_table import ModelRoute

MODELS = "/v1/models"
# Between so many other requests have their turn: 1 ms.
AT_ONCE = 500


async def list_models(models: Iterable[ModelRoute], seen: Visibility) -> bytes:
    """The whole answer."""
    models = list(models)
    entries = _entries(models, seen)
    pieces: list[str] = []
    while some := list(islice(entries, AT_ONCE)):
        if shown := [entry for entry in some if entry]:
            pieces.append(json.dumps(shown, ensure_ascii=False)[1:-1])
        await asyncio.sleep(0)
    return b'{"object": "list", "data": [' + ", ".join(pieces).encode() + b"]}"


def _entries(models: list[ModelRoute], seen: Visibility) -> Iterator[dict[str, Any] | None]:
    """Models first; of adapters, of which there may be thousands, no more than OpenAI's fields and the parent.

    None for each that the caller does not see: looking costs time, too.
    """
    for model in models:
        yield describe(model, model.name) if seen(model) else None
    for model in models:
        for adapter in listed_adapters(model):
            name = f"{model.name}:{adapter}"
            yield entry(name, model.created) | {"parent": model.name} if seen(model, adapter) else None


def describe(model: ModelRoute, name: str) -> dict[str, Any]:
    """A model, or one of its adapters, with what llmrun knows beside."""
    more: dict[str, Any] = {
        "state": model.state,
        "app": model.app,
        "version": model.version,
        "aliases": list(model.names[1:]),
        "paths": sorted(model.paths),
    }
    if model.max_model_len:
        more["max_model_len"] = model.max_model_len
    parent = {"parent": model.name} if ":" in name else {}
    return entry(name, model.created) | {"llmrun": more} | parent


def entry(name: str, created: int) -> dict[str, Any]:
    """A model as OpenAI has it; `created` in Unix seconds."""
    return {"id": name, "object": "model", "created": created, "owned_by": "llmrun"}
