"""Specs, deployed models and replica reports with defaults, for unit tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrun.decorator import build_spec
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun_runtime.actors import ClusterActors
from llmrun_runtime.control.actor import Control
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.listening import Listening
from llmrun_runtime.placement import Placement
from llmrun_runtime.wire.reports import ReplicaReport

CPU = Placement(1, 0)


def spec(name: str = "one", **options: Any) -> ModelSpec:
    """Return a model's spec, with options as in `@llm`."""
    return build_spec({"model": "org/model", "name": name, **options})


def deployed(model: ModelSpec, app: str = "app", placement: Placement = CPU, *, proven: bool = True) -> Deployed:
    """Return the model with version 1 active."""
    return Deployed(app, 1, 1, model, placement, proven=proven)


def report(state: Any = "ready", replica: str = "r1", **fields: Any) -> ReplicaReport:
    """Return the report of a replica of model `one`."""
    defaults: dict[str, Any] = {
        **{"model": "one", "version": 1, "node": "n"},
        **{"host": "h", "port": 1, "link": 2, "token": "t"},
    }
    return ReplicaReport(id=replica, state=state, **(defaults | fields))


async def make_control(home: Path) -> Control:
    """Return a control as Ray creates it."""
    settings = Settings(home=home).model_dump(mode="json")
    control = Control.__new__(Control)
    await control.__init__(ClusterActors(settings, Listening()))  # type: ignore[misc]
    return control
