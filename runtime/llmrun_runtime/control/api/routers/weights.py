"""Weights on the nodes."""

from __future__ import annotations

from fastapi import APIRouter

from llmrun.wire import WeightsRequest, WeightsRow
from llmrun_runtime.control.api.dependencies import Plane

router = APIRouter()


@router.get("/weights")
async def list_weights(plane: Plane) -> list[WeightsRow]:
    """Return the weights on all nodes."""
    return await plane.weights.rows()


@router.post("/weights")
async def start_operation(request: WeightsRequest, plane: Plane) -> dict[str, str]:
    """Start a weights operation; return its ID."""
    return {"id": plane.weights_operations.start(request).id}
