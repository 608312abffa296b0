"""Presents a model: as a route to ingresses, as a status to people. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from llmrun.wire import ModelStatus, ReplicaStatus, State
from llmrun_runtime.control.autoscaling.bad_nodes import describe
from llmrun_runtime.control.autoscaling.model_state import ModelState
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.wire.routing_table import ModelRoute, ReplicaRoute

# The phase that follows each moment that a replica reports, the last one first.
PHASES = {"forked": "loading weights", "weights": "starting the engine", "placed": "fetching weights"}


@dataclass(frozen=True)
class ModelView:
    """One model: its row, the autoscaler's state of it, its replicas and its target."""

    row: Deployed
    model_state: ModelState
    registry: Registry
    target: int
    locked: bool
    """Whether a deploy has locked the model."""

    def state(self) -> State:
        """Return one of the five states."""
        row = self.row
        if self.registry.ready(row.name, row.engine_version):
            return "hot"
        if self.model_state.warm_until or self.target or self.locked:
            return "waking"
        if self.registry.replicas_of(row.name):
            return "draining"
        return "failed" if self.model_state.failure else "cold"

    def cause(self) -> str:
        """Return the reason for a failure, a shortage or an eviction, in one line; "" if there is none."""
        state = self.model_state
        if state.error:
            return state.error
        if state.failure:
            return state.failure.cause
        return state.death or state.search.shortage or state.evicted

    def phase(self) -> str:
        """Return the current phase of the model's start; "" once a replica is ready."""
        row = self.row
        if self.registry.ready(row.name, row.engine_version):
            return ""
        reports = self.registry.placed(row.name, row.engine_version)
        reached = {moment for report in reports for moment in report.moments}
        for moment, phase in PHASES.items():
            if moment in reached:
                return phase
        return self.model_state.search.shortage or "placing a replica"

    def route(self, now: float, usual_start: float) -> ModelRoute:
        """Return the model's entry of the routing table; `now` is monotonic."""
        row, state, failure = self.row, self.model_state, self.model_state.failure
        ready = self.registry.ready(row.name, row.engine_version)
        return ModelRoute(
            name=row.name,
            app=row.app,
            version=row.version,
            state=self.state(),
            created=int(row.created),
            names=row.spec.served_names,
            paths=state.paths or get_engine(row.spec.engine).paths,
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
            max_output_tokens=row.spec.max_output_tokens,
            max_model_len=state.max_model_len,
            log_engine_metrics=row.spec.log_engine_metrics,
            lora=row.spec.lora is not None,
            adapters=state.adapters,
            adapters_error=state.adapters_error,
        )

    def status(self, state: State | None = None, cause: str | None = None) -> ModelStatus:
        """Return the model's status for people; `state` and `cause` are for a version that is not active."""
        row = self.row
        texts = [self.cause() if cause is None else cause, describe(self.model_state.set_aside.values())]
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
            cause="; ".join(filter(None, texts)),
            details=tuple(
                ReplicaStatus(
                    id=r.id[:12],
                    version=r.version,
                    state=r.state,
                    node=r.node[:12],
                    address=f"{r.host}:{r.port}" if r.port else "",
                    in_flight=r.in_flight,
                    cores=r.cores,
                )
                for r in self.registry.replicas_of(row.name)
            ),
        )


def unreadable_status(name: str, cause: str) -> ModelStatus:
    """Return the status of a stored model that this release cannot read."""
    return ModelStatus(
        name=name,
        app="",
        state="failed",
        version=0,
        proven=False,
        replicas=0,
        in_flight=0,
        waiting=0,
        model="",
        pin="",
        aliases=(),
        placement="",
        cause=f"{cause}. Deploy the model again, or start the release that stored it",
        details=(),
    )
