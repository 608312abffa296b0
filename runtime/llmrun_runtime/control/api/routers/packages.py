"""Code packages, named by their SHA-256 digest."""

from __future__ import annotations

import hashlib

from fastapi import APIRouter, Request, Response

from llmrun.errors import Refused
from llmrun.wire import MAX_PACKAGE_BYTES
from llmrun_runtime.control.api.dependencies import Plane

router = APIRouter()


@router.head("/packages/{digest}")
async def has_package(digest: str, plane: Plane) -> Response:
    """Respond 200 if the package is stored, else 404."""
    found = await plane.database.run(plane.database.has_package, digest)
    return Response(status_code=200 if found else 404)


@router.put("/packages/{digest}")
async def put_package(digest: str, request: Request, plane: Plane) -> Response:
    """Store a package."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_PACKAGE_BYTES:
            raise Refused(f"the code package is larger than {MAX_PACKAGE_BYTES >> 20} MiB", 413)
    if hashlib.sha256(data).hexdigest() != digest:
        raise Refused("the code package arrived damaged. Deploy again", 400)
    await plane.database.run(plane.database.put_package, digest, bytes(data))
    return Response(status_code=204)
