"""How a model looks: to ingresses as a route, to people as a status. Pure."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from llmrun.wire import ModelStatus, ReplicaStatus, State
from llmrun_runtime.control.autoscaling.policy import Failure
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.wire.routing_table import ModelRoute, ReplicaRoute

# What comes after each moment that a replica reports, the last one first.
PHASES = {"forked": "loading weights", "weights": "starting the engine", "placed": "bringing weights"}


@dataclass
class ModelState:
    """What is remembered of one model in force beside its row."""

    failure: Failure | None = None
    death: str = ""
    low_since: float = 0
    surplus_since: float = 0
    """Since when more replicas have been serving than Serve was told to keep; 0 if there are no such."""
    unplaced_since: float = 0
    shortage: str = ""
    pending: bool = False
    """The target was raised, and not all of that has been placed yet."""
    by_hand_until: float = 0
    """`llmrun warm` waits for it, until then at most; 0 if it does not."""
    unloaded: bool = False
    """`llmrun unload`: zero until somebody asks."""
    going: dict[str, str] = field(default_factory=dict)
    """Replicas that make room for this one, and their models."""
    going_since: float = 0
    yielded: str = ""
    """The model that this one made room for."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    paths: frozenset[str] = frozenset()
    """The inference paths that its engines have; none before one has run."""
    max_model_len: int = 0
    adapters: dict[str, str] | None = None
    """Pins of adapters by name; None while nobody knows."""
    adapters_trouble: str = ""


@dataclass(frozen=True)
class ModelView:
    """One model: its row, what is remembered of it, what runs, what should."""

    row: Deployed
    facts: ModelState
    registry: Registry
    target: int
    held: bool
    """Whether a deploy steers it."""

    def state(self) -> State:
        """One of the five."""
        row = self.row
        if self.registry.ready(row.name, row.engine_version):
            return "hot"
        if self.facts.by_hand_until or self.target or self.held:
            return "waking"
        if self.registry.of(row.name):
            return "draining"
        return "failed" if self.facts.failure else "cold"

    def cause(self) -> str:
        """Why it is not as one would like, in one line; "" if all is well."""
        facts = self.facts
        gave = f"made room for {facts.yielded}" if facts.yielded else ""
        return facts.failure.cause if facts.failure else facts.death or facts.shortage or gave

    def phase(self) -> str:
        """What a model that wakes is at; "" once it answers."""
        row = self.row
        if self.registry.ready(row.name, row.engine_version):
            return ""
        passed = {part for report in self.registry.of(row.name, row.engine_version) for part in report.moments}
        for part, phase in PHASES.items():
            if part in passed:
                return phase
        return self.facts.shortage or "placing a replica"

    def route(self, now: float, usual_start: float) -> ModelRoute:
        """For the routing table; `now` is of the monotonic clock."""
        row, failure = self.row, self.facts.failure
        ready = self.registry.ready(row.name, row.engine_version)
        return ModelRoute(
            name=row.name,
            app=row.app,
            version=row.version,
            state=self.state(),
            created=int(row.created),
            names=row.spec.served_names,
            paths=self.facts.paths or get_engine(row.spec.engine).paths,
            max_ongoing=row.spec.max_ongoing_requests,
            replicas=tuple(ReplicaRoute(r.id, r.host, r.link, r.token, r.adapters) for r in ready),
            failures=failure.count if failure else 0,
            paused=failure is not None and failure.refuses(now),
            cause=self.cause(),
            phase=self.phase(),
            usual_start=usual_start,
            max_queued=row.spec.max_queued,
            rpm=row.spec.rpm,
            tpm=row.spec.tpm,
            max_in_flight=row.spec.max_in_flight,
            max_model_len=self.facts.max_model_len,
            log_engine_metrics=row.spec.log_engine_metrics,
            lora=row.spec.lora is not None,
            adapters=self.facts.adapters,
            adapters_trouble=self.facts.adapters_trouble,
        )

    def status(self, state: State | None = None, cause: str | None = None) -> ModelStatus:
        """For people; `state` and `cause` for a version that is not in force."""
        row = self.row
        return ModelStatus(
            name=row.name,
            app=row.app,
            state=self.state() if state is None else state,
            version=row.version,
            proven=row.proven,
            replicas=len(self.registry.ready(row.name, row.engine_version)),
            in_flight=self.registry.in_flight(row.name),
            waiting=self.registry.waiting(row.name),
            model=row.spec.model.source,
            pin=row.pin.short if row.pin else "",
            aliases=row.spec.aliases,
            placement=str(row.placement),
            cause=self.cause() if cause is None else cause,
            details=tuple(
                ReplicaStatus(
                    id=r.id[:12],
                    version=r.version,
                    state=r.state,
                    node=r.node[:12],
                    address=f"{r.host}:{r.port}" if r.port else "",
                    in_flight=r.in_flight,
                )
                for r in self.registry.of(row.name)
            ),
        )
