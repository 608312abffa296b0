"""The JSON messages between the command line and control, under `/llmrun/v1`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmrun.identity import ADMIN_NAME
from llmrun.spec import ModelSpec
from llmrun.weights import AnyWeights

CONTROL_ROOT = "/llmrun/v1"
VERSION_HEADER = "x-llmrun-version"
BY_HEADER = "X-LLMRun-By"
"""Who sends a request to control, as `user@host`."""
"""The sender's release, in requests to control and in its responses."""
MAX_ADAPTER_BYTES = 8 * 2**30
MAX_PACKAGE_BYTES = 100 * 2**20
State = Literal["cold", "waking", "hot", "draining", "failed"]
ReplicaState = Literal["starting", "ready", "draining"]
Priority = Literal["batch", "normal", "high"]
EventKind = Literal["step", "progress", "warning", "done", "ready", "unproven", "failed", "removed", "tuned", "end"]
OperationState = Literal["running", "finished", "failed", "cancelled"]


class Request(BaseModel):
    """The base class of messages to control. An unknown field is an error: control would not do what it asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(BaseModel):
    """The base class of messages from control.

    Ignores the fields that a later release added, and accepts a later release's states and kinds: `State | str`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")


class DeployRequest(Request):
    """An app file's models, and the plan that the user confirmed."""

    app: str
    source: str
    """Where the app is deployed from: `host:path`, or `cli` for a model without a file."""
    specs: tuple[ModelSpec, ...]
    only: bool = False
    """Change only these models, and do not treat the app's other models as removed (`PATH::Name`)."""
    prune: bool = False
    adopt: bool = False
    lazy: bool = False
    force: bool = False
    """Without capacity next to a proven version, replace it before the proof."""
    by: str = ""
    """Who deploys, for `llmrun deploy list`. Not verified."""
    plan: str = ""
    """The fingerprint of the shown plan. Control refuses the deploy if the current plan differs."""
    unattended: bool = False
    """No person confirmed the plan: if the current one differs, do what the file says all the same."""


class Change(Answer):
    """The effect of a deploy on one model. `remove` applies only with `prune`."""

    model: str
    kind: Literal["add", "change", "tune", "remove", "same"] | str
    """`change` starts a new engine; `tune` changes options without a restart."""
    lines: tuple[str, ...] = ()
    placement: str = ""


class Plan(Answer):
    """The changes that a deploy would make."""

    app: str
    changes: tuple[Change, ...]
    fingerprint: str


class DeployRow(Answer):
    """One deploy, running or ended."""

    id: str
    app: str
    state: OperationState | str
    step: str
    """The current step, or the result."""
    started: float
    """Unix time."""
    ended: float
    """Unix time; 0 while it runs."""
    by: str


class CancelRequest(Request):
    """The request of `llmrun deploy cancel`."""

    by: str = ""
    """Who cancels. Not verified."""


class Event(Answer):
    """One event of an operation. `end` is its last; `ready`, `unproven`, `failed` or `removed` is a model's last."""

    kind: EventKind | str
    model: str = ""
    text: str = ""
    here: int = 0
    """For `progress`: bytes downloaded to the place that `text` names."""
    total: int = 0
    """For `progress`: bytes to download."""


class AdapterRow(Answer):
    """One adapter of a model."""

    name: str
    source: str
    short: str
    """The current revision: a commit, or the hash of the files' names, sizes and checksums."""
    bytes: int
    rank: int = 0
    """The LoRA rank; 0 if unknown."""
    loaded_on: tuple[str, ...] = ()
    """Replicas whose engines hold it."""
    last_used: float = 0
    """Unix time; 0 if unused since control started."""
    problem: str = ""
    """Why this folder is not served, though it looks like an adapter; "" for an adapter."""


class WeightsRow(Answer):
    """Weights that are stored on a node."""

    source: str
    pin: str
    """The pin's name on disk."""
    short: str
    """The pinned revision: a commit, or the hash of the manifest."""
    bytes: int
    files: int
    last_used: float
    """Unix time."""
    node: str
    """The node's address."""
    pinned_by: tuple[str, ...] = ()
    """The deployed models that use them."""


class WeightsRequest(Request):
    """The request of a `llmrun weights …` command."""

    do: Literal["pull", "verify", "remove", "prune", "import", "mirror"]
    weights: AnyWeights | None = None
    target: AnyWeights | None = None
    """For `mirror`: the destination."""
    folder: str = ""
    """For `import`: an absolute path on a node."""


class ReplicaStatus(Answer):
    """One replica."""

    id: str
    version: int
    state: ReplicaState | str
    node: str
    address: str
    in_flight: int
    cores: tuple[int, ...] = ()
    """The CPUs that its engine computes on; empty if llmrun did not choose them."""


# The phases of a cold start, in order.
START_PARTS = ("decided", "placed", "weights", "forked", "ready", "registered", "first_token")


class ColdStart(Answer):
    """The timing of one start from zero replicas to the first token."""

    model: str
    version: int
    node: str
    """The node's address."""
    forked: bool
    """Whether the engine was forked from the node's fork server."""
    asked: float
    """Unix time of the request that started it."""
    parts: dict[str, float]
    """Seconds from `asked` to the end of each phase in START_PARTS."""


class ModelStatus(Answer):
    """One model, as shown by `llmrun status --json`."""

    name: str
    app: str
    state: State | str
    version: int
    proven: bool
    replicas: int
    in_flight: int
    waiting: int
    model: str
    pin: str
    """The revision pinned at the deploy: a commit, or the hash of a manifest; empty for a path."""
    aliases: tuple[str, ...]
    placement: str
    cause: str
    details: tuple[ReplicaStatus, ...]


class Status(Answer):
    """All deployed models."""

    url: str
    models: tuple[ModelStatus, ...]
    warnings: tuple[str, ...] = ()
    """Disks that are almost full, one line each."""


Role = Literal["user", "viewer", "admin"]
"""What a key opens: the models; status, logs and usage of the cluster; or everything."""


class KeyFacts(Answer):
    """An API key's permissions and limits. 0 means no limit."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
    models: tuple[str, ...] = ()
    """Names of the allowed models; empty for all."""
    rpm: int = Field(default=0, ge=0)
    """Requests per minute."""
    tpm: int = Field(default=0, ge=0)
    """Tokens per minute, of prompts and answers together."""
    max_in_flight: int = Field(default=0, ge=0)
    """Requests that wait or are being answered."""
    max_output_tokens: int = Field(default=0, ge=0)
    """Tokens that one request may generate, in all its choices."""
    wake: bool = True
    """Whether requests wake models. Otherwise they reach hot models only, and do not keep them hot."""
    priority: Priority | str = "normal"
    """The highest priority that its requests may have."""
    role: Role | str = "user"
    disabled: bool = False
    """Whether it is rejected until it is enabled again."""
    expires: float = 0
    """Unix time; 0 if the key does not expire."""
    created: float = 0
    """Unix time."""

    @property
    def limited(self) -> bool:
        """Whether the key has any limit."""
        return bool(self.rpm or self.tpm or self.max_in_flight)


class KeyInfo(KeyFacts):
    """The same as a request: an unknown field is an error, because it may be a limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    priority: Priority = "normal"
    role: Role = "user"


ADMIN = KeyInfo(name=ADMIN_NAME, priority="high", role="admin")
"""The admin key."""


class KeyChange(BaseModel):
    """New values of a key's fields; None keeps the old one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    models: tuple[str, ...] | None = None
    rpm: int | None = Field(default=None, ge=0)
    tpm: int | None = Field(default=None, ge=0)
    max_in_flight: int | None = Field(default=None, ge=0)
    max_output_tokens: int | None = Field(default=None, ge=0)
    wake: bool | None = None
    priority: Priority | None = None
    disabled: bool | None = None
    expires: float | None = Field(default=None, ge=0)
    """Unix time; 0: never."""


class NewKey(Answer):
    """A new API key."""

    key: str
    """Shown only once: control stores only its hash."""
    facts: KeyFacts


class AuditRow(Answer):
    """A change of the cluster, as recorded."""

    at: float
    """Unix time."""
    who: str
    """The name of the key: `admin`, or one with the role of an admin."""
    by: str = ""
    """`user@host`, as the client calls itself."""
    client: str = ""
    """The IP address that it came from."""
    action: str
    """Like `DELETE /models/one`."""
    subject: str = ""
    """The name of what was changed, if the action does not have it."""
    status: int = 0
    """Of the response; 0 if there was none."""
    request: str = ""
    """The id in the ingress's log."""


class UsageLine(Answer):
    """Usage, summed over the dimensions that the query does not group by; their fields are empty."""

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
    """GPU time of replicas, counted for models, not for keys."""
