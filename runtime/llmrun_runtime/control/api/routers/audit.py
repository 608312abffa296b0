"""The audit log."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query

from llmrun.wire import AuditRow
from llmrun_runtime.control.api.dependencies import Plane

MAX_ROWS = 10_000
router = APIRouter()


@router.get("/audit")
async def audit(plane: Plane, tail: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 50) -> list[AuditRow]:
    """Return the last changes, the oldest first."""
    return await asyncio.to_thread(plane.audit.tail, tail)
