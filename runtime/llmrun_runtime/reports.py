"""What replicas and ingresses tell control, twice a second."""

from __future__ import annotations

from dataclasses import dataclass

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

    def __repr__(self) -> str:  # the token stays out of logs
        return f"Registration({self.id[:12]} {self.model} v{self.version} {self.state} {self.host}:{self.port})"


@dataclass
class Traffic:
    """What one ingress counts for one model."""

    waiting: int = 0
    in_flight: int = 0
