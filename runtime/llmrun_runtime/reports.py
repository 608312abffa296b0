"""What replicas and ingresses tell control, twice a second."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmrun.wire import ReplicaState

REPORT_S = 0.5
# Who is silent for so long is taken to be gone.
LEASE_S = 5.0


@dataclass(frozen=True)
class Registration:
    """One replica's report."""

    id: str
    model: str
    version: int
    node: str
    host: str
    port: int
    token: str
    state: ReplicaState
    in_flight: int = 0
    idle_s: float = 0
    forked: bool = False
    """Whether its engine came from a warm parent."""
    moments: dict[str, float] = field(default_factory=dict)
    """Unix times of what it has passed through: those of `llmrun.wire.START_PARTS` that a replica sees."""

    def __repr__(self) -> str:  # the token stays out of logs
        return f"Registration({self.id[:12]} {self.model} v{self.version} {self.state} {self.host}:{self.port})"


@dataclass
class Traffic:
    """What one ingress counts for one model."""

    waiting: int = 0
    in_flight: int = 0
    since: float = 0
    """Since when (unix time) somebody has been waiting; 0 if nobody waits."""
