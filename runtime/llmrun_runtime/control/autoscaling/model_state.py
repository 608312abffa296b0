"""What the autoscaler remembers of each model between ticks. Times are monotonic; 0 stands for never."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from llmrun_runtime.control.autoscaling.policy import Failure


@dataclass
class EvictionState:
    """A model's search for capacity: why a replica is not placed, and the replicas evicted for it."""

    unplaced_since: float = 0
    """Since when a required replica has not been placed."""
    shortage: str = ""
    """Why it cannot be placed, in one line."""
    victims: dict[str, str] = field(default_factory=dict)
    """The replicas being evicted, and their models."""
    started: float = 0
    """When the last eviction started."""


@dataclass
class ModelState:
    """The autoscaler's state of one model's active version."""

    failure: Failure | None = None
    death: str = ""
    """Why an engine died after it was ready."""
    low_since: float = 0
    """Since when fewer replicas than the target have been enough."""
    surplus_since: float = 0
    """Since when more replicas than Serve's target have been ready."""
    pending: bool = False
    """Whether the target was raised and some of the new replicas are not placed yet."""
    warm_until: float = 0
    """Until when `llmrun warm` requests a replica; 0 once one is ready."""
    unloaded: bool = False
    """Whether `llmrun unload` keeps it at zero, until the next request."""
    eviction: EvictionState = field(default_factory=EvictionState)
    evicted_for: str = ""
    """The model that this model's replicas were last evicted for."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    """Sets the target in Serve."""
    paths: frozenset[str] = frozenset()
    """The inference paths that its engines serve; empty until one has reported."""
    max_model_len: int = 0
    adapters: dict[str, str] | None = None
    """Pins of adapters by name; None if they could not be listed, because of `adapters_error`."""
    adapters_error: str = ""
    error: str = ""
    """The exception with which control's last tick of this model failed; the model keeps its last route and target."""

    @property
    def setting_target(self) -> bool:
        """Whether a target is being set in Serve."""
        return self.task is not None and not self.task.done()
