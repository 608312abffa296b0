"""What replicas and ingresses report to control twice per second, and what control returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from llmrun.wire import Priority, ReplicaState
from llmrun_runtime.wire.message import Message
from llmrun_runtime.wire.usage import PaceRow, Row

REPORT_S = 0.5
# Control drops a replica or an ingress that has not reported for this long.
LEASE_S = 5.0
# A caller that sends one request after the other has none in flight for a moment: its model is not idle then.
BETWEEN_REQUESTS_S = 0.5
# From the lowest to the highest.
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


@dataclass(frozen=True)
class UsedOnNodes(Message):
    """What nodes must keep: all of it belongs to versions that can be started."""

    models: frozenset[str]
    """The models whose logs are kept."""
    packages: frozenset[str]
    """The sha256 of code packages."""
    requirements: frozenset[tuple[str, ...]]


@dataclass(frozen=True)
class ReplicaReport(Message):
    """One replica's report."""

    id: str
    model: str
    version: int
    node: str
    host: str
    port: int
    """The engine's HTTP port."""
    link: int
    """The engine's port for links from ingresses."""
    token: str
    state: ReplicaState
    in_flight: int = 0
    idle_s: float = 0
    forked: bool = False
    """Whether the fork server created its engine."""
    cores: tuple[int, ...] = ()
    """The CPUs that its engine computes on; empty if llmrun did not choose them."""
    moments: dict[str, float] = field(default_factory=dict)
    """When it reached each part of its start (Unix times): those of `llmrun.wire.START_PARTS` that a replica sees."""

    paths: frozenset[str] = frozenset()
    """The inference paths that its engine serves; empty until the engine has reported them."""
    max_model_len: int = 0
    warning: str = ""
    """See `Engine.warning`."""
    adapters: frozenset[str] = frozenset()
    """The pins of the adapters that its engine has loaded."""
    usage: tuple[Row, ...] = ()
    """Usage since the engine's start: the rows that changed since the last report that arrived."""
    paces: tuple[tuple[PaceRow, PaceRow | None], ...] = ()
    """Changed rows of times per output token, each with its value in the last report that arrived (None: not in it)."""

    def __repr__(self) -> str:  # without the token, for logs
        return f"ReplicaReport({self.id[:12]} {self.model} v{self.version} {self.state} {self.host}:{self.port})"


@dataclass(frozen=True)
class AdapterRevision(Message):
    """Control's reply to an ingress that resolves an adapter's revision: a pin, or an error."""

    pin: str = ""
    error: str = ""
    missing: bool = False
    """Whether the revision does not exist, so that a retry would not help."""


@dataclass
class Traffic(Message):
    """One ingress's counts of one model's requests."""

    waiting: int = 0
    in_flight: int = 0
    since: float = 0
    """Since when (Unix time) requests have been waiting; 0 if none waits."""
    priority: int = PRIORITIES.index("normal")
    """The highest priority of the waiting requests: its index in PRIORITIES."""
    in_flight_priority: int = PRIORITIES.index("normal")
    """The highest priority of the requests in flight, and of those that ended in the last BETWEEN_REQUESTS_S."""
    recent: bool = False
    """Whether a request ended in the last BETWEEN_REQUESTS_S."""


# What a limit applies to: a key (`key:NAME`) or a model (`model:NAME`).
Subject = str


def key_subject(name: str) -> Subject:
    """Return the subject of a key."""
    return f"key:{name}"


def model_subject(name: str) -> Subject:
    """Return the subject of a model."""
    return f"model:{name}"


@dataclass(frozen=True)
class LocalUsage(Message):
    """The usage of one subject with limits at one ingress."""

    requests: int = 0
    """In the last minute."""
    in_flight: int = 0
    reserved: int = 0
    """Tokens that its requests in flight may still generate."""


@dataclass(frozen=True)
class RemoteUsage(Message):
    """The usage of one subject with limits that one ingress cannot count itself."""

    requests: int = 0
    """In the last minute, at other ingresses."""
    in_flight: int = 0
    """At other ingresses."""
    tokens: int = 0
    """In the last minute, at all replicas."""
    tokens_wait: float = 0
    """Seconds until its tokens are below its limit."""
    reserved: int = 0
    """Tokens that requests in flight at other ingresses may still generate."""
