"""The models that are deployed, and the versions that are being proven."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from llmrun.spec import ModelSpec
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.pin import Pin


@dataclass(frozen=True)
class Deployed:
    """A model as it is in force."""

    app: str
    version: int
    engine_version: int
    spec: ModelSpec
    placement: Placement
    proven: bool
    pin: Pin | None = None
    """None for weights that are used in place."""
    created: float = field(default_factory=time.time)
    """Unix time."""

    @property
    def name(self) -> str:
        """The model's public name."""
        return self.spec.name


@dataclass(frozen=True)
class Candidate:
    """A version that is not in force: it is being proven, or `cause` says why it could not be."""

    row: Deployed
    cause: str = ""
