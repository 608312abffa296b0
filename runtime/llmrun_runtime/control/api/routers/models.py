"""Deployed models: status, specs, cold starts, warm, unload, delete."""

from __future__ import annotations

from fastapi import APIRouter

from llmrun.errors import Refused
from llmrun.spec import ModelSpec
from llmrun.wire import ColdStart, Status
from llmrun_runtime.control.api.dependencies import Plane

router = APIRouter()


@router.get("/status")
async def status(plane: Plane) -> Status:
    """Return the status of all models."""
    failures = (plane.autoscaler.failure,) if plane.autoscaler.failure else ()
    return Status(url=plane.url, models=plane.autoscaler.statuses(), warnings=(*failures, *plane.disk_watch.warnings()))


@router.get("/specs")
async def specs(plane: Plane) -> list[ModelSpec]:
    """Return the specs of all active versions, sorted by model."""
    return [row.spec for _, row in sorted(plane.models.deployed.items())]


@router.get("/cold-starts/{name:path}")
async def cold_starts(name: str, plane: Plane) -> list[ColdStart]:
    """Return a model's last cold starts, the newest first."""
    return await plane.database.run(plane.cold_starts.history, plane.models.resolve(name))


@router.post("/warm/{name:path}")
async def warm(name: str, plane: Plane) -> dict[str, str]:
    """Start a replica of a model that is scaled to zero."""
    return {"model": plane.autoscaler.warm(name)}


@router.post("/unload/{name:path}")
async def unload(name: str, plane: Plane) -> dict[str, str]:
    """Scale a model to zero."""
    return {"model": plane.autoscaler.unload(name)}


@router.delete("/models/{name:path}")
async def delete_model(name: str, plane: Plane) -> dict[str, list[str]]:
    """Remove a model."""
    model = plane.models.resolve(name)
    await plane.deployer.delete([model])
    return {"deleted": [model]}


@router.delete("/apps/{app}")
async def delete_app(app: str, plane: Plane) -> dict[str, list[str]]:
    """Remove all models of an app."""
    rows = [*plane.models.deployed.values(), *(candidate.row for candidate in plane.models.candidates.values())]
    models = sorted({row.name for row in rows if row.app == app})
    if not models:
        apps = sorted({row.app for row in rows})
        raise Refused(f"app {app!r} not found; available: {', '.join(apps) or 'none'}", 404)
    await plane.deployer.delete(models)
    return {"deleted": models}
