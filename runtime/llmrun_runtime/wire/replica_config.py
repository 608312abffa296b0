"""What control tells a replica: the version that it serves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from llmrun.spec import ModelSpec
from llmrun_runtime.weights.pin import Pin


class ReplicaConfig(BaseModel):
    """A version as control tells it to its replicas."""

    model_config = ConfigDict(frozen=True)
    spec: ModelSpec
    version: int
    pin: Pin | None
    start_timeout: float
    drain_timeout: float
    hook_timeout: float

    @property
    def key(self) -> str:
        """Names the version."""
        return f"{self.spec.name} v{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """For the application's arguments."""
        return self.model_dump(mode="json")
