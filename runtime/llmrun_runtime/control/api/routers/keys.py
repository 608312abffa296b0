"""API keys."""

from __future__ import annotations

from fastapi import APIRouter

from llmrun.wire import KeyInfo, NewKey
from llmrun_runtime.control.api.audit import Subject
from llmrun_runtime.control.api.dependencies import Plane

router = APIRouter()


@router.get("/keys")
async def list_keys(plane: Plane) -> list[KeyInfo]:
    """Return all API keys, without their secrets."""
    return plane.keys.rows()


@router.post("/keys")
async def create_key(info: KeyInfo, plane: Plane, subject: Subject) -> NewKey:
    """Create an API key."""
    subject(info.name)
    plane.adapters.check_names(info.models)
    return await plane.database.run(plane.keys.create, info)


@router.delete("/keys/{name}")
async def revoke_key(name: str, plane: Plane) -> dict[str, str]:
    """Revoke an API key."""
    await plane.database.run(plane.keys.revoke, name)
    return {"revoked": name}
