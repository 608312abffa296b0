"""Plans and deploys."""

from __future__ import annotations

from fastapi import APIRouter

from llmrun.wire import DeployRequest, Plan
from llmrun_runtime.control.api.dependencies import Plane

router = APIRouter()


@router.post("/plan")
async def plan(request: DeployRequest, plane: Plane) -> Plan:
    """Return what a deploy would do."""
    return (await plane.deployer.plan(request))[0]


@router.post("/deploys")
async def deploy(request: DeployRequest, plane: Plane) -> dict[str, str]:
    """Start a deploy; return the operation's ID."""
    return {"id": (await plane.deployer.start(request)).id}
