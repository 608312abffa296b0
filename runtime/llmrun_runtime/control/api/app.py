"""Control's HTTP API under `/llmrun/v1`, which clients reach through the ingress."""

from __future__ import annotations

from fastapi import FastAPI

import llmrun
from llmrun.wire import CONTROL_ROOT
from llmrun_runtime.asgi import App
from llmrun_runtime.control.api.audit import Audited
from llmrun_runtime.control.api.auth import Access
from llmrun_runtime.control.api.errors import add_error_handlers
from llmrun_runtime.control.api.routers import (
    adapters,
    audit,
    deploys,
    keys,
    logs,
    metrics,
    models,
    operations,
    packages,
    usage,
    weights,
)
from llmrun_runtime.control.api.version import with_version
from llmrun_runtime.control.control_plane import ControlPlane


def make_api(plane: ControlPlane) -> App:
    """Return the API of a control plane."""
    api = FastAPI(title="llmrun control", version=llmrun.__version__, docs_url=None, redoc_url=None)
    api.state.plane = plane
    add_error_handlers(api)
    for module in (models, deploys, packages, operations, weights, adapters, keys, usage, logs, audit):
        api.include_router(module.router, prefix=CONTROL_ROOT)
    api.include_router(metrics.router)
    return with_version(Access(Audited(api, plane.audit), plane.keys))
