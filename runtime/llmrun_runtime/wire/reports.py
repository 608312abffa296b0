"""What replicas and ingresses tell control, twice a second, and what they ask of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmrun.wire import ReplicaState
from llmrun_runtime.wire.usage import PaceRow, Row

REPORT_S = 0.5
# Who is silent for so long is taken to be gone.
LEASE_S = 5.0


@dataclass(frozen=True)
class ReplicaReport:
    """One replica's report."""

    id: str
    model: str
    version: int
    node: str
    host: str
    port: int
    """Where its engine speaks HTTP."""
    link: int
    """Where its engine listens for ingresses."""
    token: str
    state: ReplicaState
    in_flight: int = 0
    idle_s: float = 0
    forked: bool = False
    """Whether its engine came from a warm parent."""
    moments: dict[str, float] = field(default_factory=dict)
    """Unix times of what it has passed through: those of `llmrun.wire.START_PARTS` that a replica sees."""

    paths: frozenset[str] = frozenset()
    """The inference paths that its engine has; none before it has said them."""
    max_model_len: int = 0
    adapters: frozenset[str] = frozenset()
    """The pins of the adapters that its engine has loaded."""
    usage: tuple[Row, ...] = ()
    """What was used since the engine's start: the rows that changed since the last report that arrived."""
    paces: tuple[tuple[PaceRow, PaceRow | None], ...] = ()
    """Likewise `meter.paces`, each row beside what it was in the last report that arrived; None if it was in none."""

    def __repr__(self) -> str:  # the token stays out of logs
        return f"Registration({self.id[:12]} {self.model} v{self.version} {self.state} {self.host}:{self.port})"


@dataclass(frozen=True)
class AdapterRevision:
    """What control answers an ingress that asks for an adapter's revision: a pin, or what is the trouble."""

    pin: str = ""
    trouble: str = ""
    missing: bool = False
    """There is none: asking again would not help."""


@dataclass
class Traffic:
    """What one ingress counts for one model."""

    waiting: int = 0
    in_flight: int = 0
    since: float = 0
    """Since when (unix time) somebody has been waiting; 0 if nobody waits."""


# Who a limit is for: a key (`key:NAME`) or a model (`model:NAME`).
Subject = str


def key_subject(name: str) -> Subject:
    """Of a key."""
    return f"key:{name}"


def model_subject(name: str) -> Subject:
    """Of a model."""
    return f"model:{name}"


@dataclass(frozen=True)
class LocalUsage:
    """What one subject with limits has asked of one ingress."""

    requests: int = 0
    """In the last minute."""
    in_flight: int = 0


@dataclass(frozen=True)
class RemoteUsage:
    """What an ingress that enforces a subject's limits cannot see itself."""

    requests: int = 0
    """In the last minute, at other ingresses."""
    in_flight: int = 0
    """At other ingresses."""
    tokens: int = 0
    """In the last minute, at all replicas."""
    tokens_wait: float = 0
    """Seconds until its tokens are below its limit again."""
