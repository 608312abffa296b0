"""API keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

from fastapi import APIRouter, Query

from llmrun.wire import KeyChange, KeyInfo, NewKey
from llmrun_runtime.control.api.audit import Subject
from llmrun_runtime.control.api.dependencies import Plane
from llmrun_runtime.control.control_plane import ControlPlane

router = APIRouter()
P = ParamSpec("P")
T = TypeVar("T")
MAX_KEEP_S = 90 * 86400.0


@router.get("/keys")
async def list_keys(plane: Plane) -> list[KeyInfo]:
    """Return all API keys, without their secrets."""
    return plane.keys.rows()


@router.post("/keys")
async def create_key(info: KeyInfo, plane: Plane, subject: Subject) -> NewKey:
    """Create an API key."""
    subject(info.name)
    plane.adapters.check_names(info.models)
    return await _changed(plane, plane.keys.create, info)


@router.patch("/keys/{name}")
async def change_key(name: str, change: KeyChange, plane: Plane) -> KeyInfo:
    """Change an API key's permissions and limits, not its secret."""
    plane.adapters.check_names(change.models or ())
    return await _changed(plane, plane.keys.change, name, change)


@router.post("/keys/{name}/rotate")
async def rotate_key(name: str, plane: Plane, keep_s: Annotated[float, Query(ge=0, le=MAX_KEEP_S)] = 0) -> NewKey:
    """Give an API key a new secret. The old one stays valid for `keep_s` seconds."""
    return await _changed(plane, plane.keys.rotate, name, keep_s)


@router.delete("/keys/{name}")
async def revoke_key(name: str, plane: Plane) -> dict[str, str]:
    """Revoke an API key."""
    await _changed(plane, plane.keys.revoke, name)
    return {"revoked": name}


async def _changed(plane: ControlPlane, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Change the keys; return when all ingresses know it."""
    result = await plane.database.run(partial(function, *args, **kwargs))
    await plane.autoscaler.wait_until_keys_are_routed()
    return result
