"""Usage by day, key, model and adapter."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from llmrun.wire import UsageLine
from llmrun_runtime.control.api.dependencies import Plane

BY = r"^(day|key|model|adapter)(,(day|key|model|adapter))*$"
DAY = r"^\d{4}-\d\d-\d\d$"
router = APIRouter()


@router.get("/usage")
async def usage(
    plane: Plane,
    by: Annotated[str, Query(pattern=BY)] = "key,model",
    since: Annotated[str, Query(pattern=DAY)] = "0000-00-00",
) -> list[UsageLine]:
    """Return the usage since a day, summed by the given columns."""
    await plane.usage.flush()
    return await plane.database.run(plane.usage.lines, by.split(","), since)
