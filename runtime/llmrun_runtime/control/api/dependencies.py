"""What the routers' endpoints depend on."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from llmrun_runtime.control.control_plane import ControlPlane


async def control_plane(request: Request) -> ControlPlane:
    """Return the control plane of the API, which `make_api` sets."""
    plane: ControlPlane = request.app.state.plane
    return plane


Plane = Annotated[ControlPlane, Depends(control_plane)]
