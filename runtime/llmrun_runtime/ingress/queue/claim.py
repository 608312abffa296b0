"""The records that pass through the queue: callers, waiters and claims."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

from llmrun_runtime.wire.reports import PRIORITIES
from llmrun_runtime.wire.routing_table import ReplicaRoute


@dataclass(frozen=True)
class Caller:
    """The properties of a request that matter for queueing and routing."""

    key: str = ""
    """The name of its API key; "" without one."""
    probe: bool = False
    """Whether it must not keep the model warm."""
    prefix: bytes = b""
    """The start of its prompt."""
    adapter: str = ""
    """The pin of its adapter."""
    adapter_label: str = ""
    """The adapter's label in metrics."""
    priority: int = PRIORITIES.index("normal")
    """Its index in PRIORITIES."""


ANONYMOUS = Caller()
# Waits in place of a client that gave up. No key has this name, and it takes no place in the queue from other requests.
PLACEHOLDER = Caller(key="\0")


@dataclass(frozen=True)
class WaitLimit:
    """When a request stops waiting for a replica; in the event loop's time."""

    started: float
    deadline: float
    source: str = ""
    """The header or setting that sets the limit, for error messages."""


@dataclass(frozen=True)
class Claim:
    """The replica for a request; counted as in flight there until it is released."""

    model: str
    replica: ReplicaRoute
    caller: Caller
    waited: bool = False


@dataclass(eq=False)
class Waiter:
    """A queued request. It leaves the queue when `turn` resolves.

    `turn`: its claim, None when `name` has become the name of another model, or the HTTPError to fail with.
    """

    name: str
    caller: Caller
    avoid: Collection[str]
    failures: int
    """The model's failed starts that are not this request's: it fails after one more."""
    number: int
    """In the order of arrival."""
    turn: asyncio.Future[Claim | None]
