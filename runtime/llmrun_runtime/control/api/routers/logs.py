"""The models' logs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from llmrun_runtime.control.api.dependencies import Plane
from llmrun_runtime.control.api.ndjson import stream_lines
from llmrun_runtime.control.control_plane import ControlPlane

FOLLOW_S = 0.5
ALL_LINES = 2**20
router = APIRouter()


@router.get("/logs/{name:path}")
async def logs(
    name: str, plane: Plane, tail: Annotated[int, Query(ge=0)] = 200, follow: bool = False
) -> StreamingResponse:
    """Stream a model's logs: the last `tail` lines of each file, then, with `follow`, new text."""
    return stream_lines(_read_logs(plane, plane.models.resolve(name), tail, follow=follow))


async def _read_logs(plane: ControlPlane, model: str, tail: int, *, follow: bool) -> AsyncIterator[dict[str, Any]]:
    """Yield new text of the model's logs on every node, file by file; once, unless `follow`."""
    offsets: dict[str, dict[str, int]] = {}
    while True:
        for node, files in (await plane.read_logs(model, offsets, tail)).items():
            for name, (offset, text) in files.items():
                offsets.setdefault(node, {})[name] = offset
                if text:
                    yield {"source": name.removesuffix(".log"), "text": text}
        if not follow:
            return
        tail = ALL_LINES  # a file that appears now is new
        await asyncio.sleep(FOLLOW_S)
