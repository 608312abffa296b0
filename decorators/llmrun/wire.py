"""What the command line and control say to each other under `/llmrun/v1`, as JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmrun.spec import ModelSpec

CONTROL_ROOT = "/llmrun/v1"
MAX_PACKAGE_BYTES = 100 * 2**20
State = Literal["cold", "waking", "hot", "draining", "failed"]
ReplicaState = Literal["starting", "ready", "draining"]


class Message(BaseModel):
    """The base of all messages."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DeployRequest(Message):
    """An app as its file has it, and what the person agreed to."""

    app: str
    source: str
    """Where it was deployed from: `host:path`, or `cli` for a model without a file."""
    specs: tuple[ModelSpec, ...]
    only: bool = False
    """Touch only the models named here: the app's others are not missing (`PATH::Name`)."""
    prune: bool = False
    adopt: bool = False
    lazy: bool = False
    plan: str = ""
    """The fingerprint of the plan that the person saw; control refuses if it would do something else now."""


class Change(Message):
    """What a deploy does to one model. `remove` is carried out only with `prune`."""

    model: str
    kind: Literal["add", "change", "tune", "remove", "same"]
    """`change` starts a new engine; `tune` changes numbers without a restart."""
    lines: tuple[str, ...] = ()
    placement: str = ""


class Plan(Message):
    """What a deploy would do."""

    app: str
    changes: tuple[Change, ...]
    fingerprint: str


class Event(Message):
    """One step of a deploy. `ready`, `unproven`, `failed` and `removed` end a model; `end` ends the deploy."""

    kind: Literal["step", "ready", "unproven", "failed", "removed", "tuned", "end"]
    model: str = ""
    text: str = ""


class ReplicaStatus(Message):
    """One replica."""

    id: str
    version: int
    state: ReplicaState
    node: str
    address: str
    in_flight: int


class ModelStatus(Message):
    """One model, as `llmrun status --json` shows it."""

    name: str
    app: str
    state: State
    version: int
    proven: bool
    replicas: int
    in_flight: int
    waiting: int
    model: str
    aliases: tuple[str, ...]
    placement: str
    cause: str
    details: tuple[ReplicaStatus, ...]


class Status(Message):
    """Everything that is deployed."""

    url: str
    models: tuple[ModelStatus, ...]
