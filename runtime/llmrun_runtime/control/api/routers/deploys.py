"""Plans and deploys: start, list, cancel."""

from __future__ import annotations

from fastapi import APIRouter

from llmrun.wire import CancelRequest, DeployRequest, DeployRow, Plan
from llmrun_runtime.control.api.audit import Subject
from llmrun_runtime.control.api.dependencies import Plane

router = APIRouter()


@router.post("/plan")
async def plan(request: DeployRequest, plane: Plane) -> Plan:
    """Return what a deploy would do."""
    return (await plane.deployer.plan(request))[0]


@router.post("/deploys")
async def deploy(request: DeployRequest, plane: Plane, subject: Subject) -> dict[str, str]:
    """Start a deploy; return the operation's ID."""
    subject(f"{request.app}: {', '.join(spec.name for spec in request.specs)}")
    return {"id": (await plane.deployer.start(request)).id}


@router.get("/deploys")
async def deploys(plane: Plane) -> list[DeployRow]:
    """Return the running deploys and the last ones that ended, the newest first."""
    return [
        DeployRow(
            id=operation.id,
            app=operation.app,
            state=operation.state,
            step=operation.last,
            started=operation.started,
            ended=operation.ended,
            by=operation.by,
        )
        for operation in plane.operations.deploys()
    ]


@router.post("/deploys/{operation_id}/cancel")
async def cancel(operation_id: str, request: CancelRequest, plane: Plane) -> dict[str, str]:
    """Cancel a deploy; return its app."""
    operation = plane.operations.find_deploy(operation_id)
    operation.cancel(request.by or "an unnamed client")
    return {"app": operation.app}
