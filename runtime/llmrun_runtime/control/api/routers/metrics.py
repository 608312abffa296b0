"""Control's page for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from llmrun_runtime.control.api.dependencies import Plane

router = APIRouter()


@router.get("/metrics")
async def metrics(plane: Plane) -> Response:
    """Return control's metrics in Prometheus' text format."""
    return Response(await plane.metrics.page(), media_type=CONTENT_TYPE_LATEST)
