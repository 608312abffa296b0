"""Long-running operations."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from llmrun_runtime.control.api.dependencies import Plane
from llmrun_runtime.control.api.ndjson import stream_lines

router = APIRouter()


@router.get("/operations/{operation_id}/events")
async def events(operation_id: str, plane: Plane) -> StreamingResponse:
    """Stream an operation's events until it ends."""
    operation = plane.operations.find(operation_id)
    return stream_lines(event.model_dump() async for event in operation.events())
