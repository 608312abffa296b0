"""The version of a model that a replica serves, as control sends it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from llmrun.spec import ModelSpec
from llmrun_runtime.weights.pin import Pin


class ReplicaConfig(BaseModel):
    """One version of a model, with the settings that its replicas need."""

    model_config = ConfigDict(frozen=True)
    spec: ModelSpec
    version: int
    pin: Pin | None
    """The revision of the weights; None for a path on the node."""
    start_timeout: float
    drain_timeout: float
    hook_timeout: float

    @property
    def key(self) -> str:
        """The name of the version."""
        return f"{self.spec.name} v{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Serialize for the arguments of the Serve application."""
        return self.model_dump(mode="json")
