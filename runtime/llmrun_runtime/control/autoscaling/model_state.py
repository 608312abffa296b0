"""What the autoscaler remembers of each model between ticks. Times are monotonic; 0 stands for never."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from llmrun_runtime.control.autoscaling.bad_nodes import BadNodes, NodeFailure
from llmrun_runtime.control.autoscaling.eviction import EvictionCandidate
from llmrun_runtime.control.autoscaling.policy import Failure

# Ray places a replica, and its worker starts and reports, within this time.
FREED_S = 4.0


@dataclass
class RoomSearch:
    """A model's search for room: why a replica is not placed, and the replicas that end for it."""

    unplaced_since: float = 0
    """Since when a required replica has not been placed."""
    shortage: str = ""
    """Why it cannot be placed, in one line."""
    victims: dict[str, EvictionCandidate] = field(default_factory=dict)
    """By id, the replicas that end."""
    started: float = 0
    """When they were chosen."""
    freed: float = 0
    """When the last of them was gone."""
    room: frozenset[str] = frozenset()
    """The nodes of the victims."""
    announced: bool = False
    """Whether `Autoscaler.on_wake` was called after they were gone."""

    def reserves(self, now: float) -> bool:
        """Whether `room` is for this model's replica: its victims end, or Ray may not have placed the replica yet."""
        return bool(self.victims) or (bool(self.freed and self.room) and now - self.freed <= FREED_S)


@dataclass
class ModelState:
    """The autoscaler's state of one model's active version."""

    failure: Failure | None = None
    past_failure: Failure | None = None
    """The failures in a row before the replica that is ready now, until it is stable."""
    bad_nodes: BadNodes = field(default_factory=BadNodes)
    set_aside: dict[str, NodeFailure] = field(default_factory=dict)
    """The nodes that its replicas avoid, as of the last tick."""
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
    warmed: bool = False
    """Whether `llmrun warm` started it; until its target is zero."""
    search: RoomSearch = field(default_factory=RoomSearch)
    evicted: str = ""
    """Why its replicas last ended for another model, in one line."""
    ending: set[str] = field(default_factory=set)
    """Its replicas that end for other models, until they are gone."""
    spared_until: float = 0
    """Until when none of its replicas end for another model."""
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
