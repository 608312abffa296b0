"""Adapters of the deployed models."""

from __future__ import annotations

from fastapi import APIRouter, Request

from llmrun.errors import Refused
from llmrun.wire import AdapterRow
from llmrun_runtime.control.api.dependencies import Plane

router = APIRouter()


@router.get("/adapters/{name:path}")
async def list_adapters(name: str, plane: Plane) -> list[AdapterRow]:
    """Return a model's adapters."""
    return plane.adapters.rows(plane.models.resolve(name), plane.registry)


@router.put("/adapters/{name:path}")
async def push_adapter(name: str, request: Request, plane: Plane) -> dict[str, str]:
    """Receive the adapter `model:adapter` as a tar and start to push it; return the operation's ID."""
    base, _, adapter = name.partition(":")
    tar = request.stream()
    try:
        operation = await plane.adapter_pushes.start(plane.models.resolve(base), adapter, tar)
    except Refused:
        async for _ in tar:  # a client that is still sending would take the response for a broken connection
            pass
        raise
    return {"id": operation.id}
