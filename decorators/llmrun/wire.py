"""What the command line and control say to each other under `/llmrun/v1`, as JSON."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmrun.spec import ModelSpec
from llmrun.weights import AnyWeights

CONTROL_ROOT = "/llmrun/v1"
MAX_ADAPTER_BYTES = 8 * 2**30
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
    """One step of a job. `ready`, `unproven`, `failed` and `removed` end a model; `end` ends the job."""

    kind: Literal["step", "progress", "done", "ready", "unproven", "failed", "removed", "tuned", "end"]
    model: str = ""
    text: str = ""
    here: int = 0
    """Of `progress`: bytes that have come, of `total`, to what `text` names."""
    total: int = 0


class AdapterRow(Message):
    """One adapter of a model."""

    name: str
    source: str
    short: str
    """What its address means now: a commit, or the hash of its files' names, sizes and checksums."""
    bytes: int
    rank: int = 0
    """0: not known."""
    loaded_on: tuple[str, ...] = ()
    """Replicas that have it in their engines."""
    last_used: float = 0
    """Unix time; 0: not since control started."""


class WeightsRow(Message):
    """Weights that lie on a node."""

    source: str
    pin: str
    """Its name on disk."""
    short: str
    """What the source's name was pinned to: a commit, or the hash of the manifest."""
    bytes: int
    files: int
    last_used: float
    """Unix time."""
    node: str
    """The node's address."""
    pinned_by: tuple[str, ...] = ()
    """The deployed models that have it."""


class WeightsRequest(Message):
    """What `llmrun weights …` asks for."""

    do: Literal["pull", "verify", "remove", "prune", "import", "mirror"]
    weights: AnyWeights | None = None
    target: AnyWeights | None = None
    """For `mirror`: where to."""
    folder: str = ""
    """For `import`: an absolute path on a node."""


class ReplicaStatus(Message):
    """One replica."""

    id: str
    version: int
    state: ReplicaState
    node: str
    address: str
    in_flight: int


# What a cold start passes through, in this order.
START_PARTS = ("decided", "placed", "weights", "forked", "ready", "registered", "first_token")


class ColdStart(Message):
    """One way from zero to the first token."""

    model: str
    version: int
    node: str
    """The node's address."""
    forked: bool
    """Whether the engine came from the node's warm parent."""
    asked: float
    """Unix time of the request that found no replica."""
    parts: dict[str, float]
    """Seconds from `asked` to the end of each of START_PARTS."""


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
    pin: str
    """What `model` was pinned to at the deploy: a commit, or the hash of a manifest; empty for a path."""
    aliases: tuple[str, ...]
    placement: str
    cause: str
    details: tuple[ReplicaStatus, ...]


class Status(Message):
    """Everything that is deployed."""

    url: str
    models: tuple[ModelStatus, ...]


class KeyInfo(Message):
    """What an API key may. 0 is no limit."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
    models: tuple[str, ...] = ()
    """Names of models; none: all."""
    rpm: int = Field(default=0, ge=0)
    """Requests a minute."""
    tpm: int = Field(default=0, ge=0)
    """Tokens a minute, of prompts and answers together."""
    max_in_flight: int = Field(default=0, ge=0)
    """Requests that wait or are answered at once."""
    wake: bool = True
    """Whether it wakes models; one that does not reaches hot ones only, and does not keep them hot."""
    expires: float = 0
    """Unix time."""
    created: float = 0
    """Unix time."""

    @property
    def limited(self) -> bool:
        """Whether anything has to be counted for it."""
        return bool(self.rpm or self.tpm or self.max_in_flight)


class NewKey(Message):
    """A key that was just made."""

    key: str
    """Shown this once: only its hash is stored."""
    facts: KeyInfo


class UsageLine(Message):
    """What was used, summed over what the question did not ask to tell apart."""

    day: str = ""
    """`2026-11-23`, in UTC."""
    key: str = ""
    model: str = ""
    adapter: str = ""
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    gpu_seconds: float = 0
    """Replicas' time on GPUs; it belongs to models, not to keys."""
