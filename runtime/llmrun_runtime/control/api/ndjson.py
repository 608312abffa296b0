"""Streams of JSON objects, one per line."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse


def stream_lines(items: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Return a response that sends each item as soon as it is available."""

    async def encoded() -> AsyncIterator[bytes]:
        async for item in items:
            yield json.dumps(item).encode() + b"\n"

    return StreamingResponse(encoded(), media_type="application/x-ndjson")
