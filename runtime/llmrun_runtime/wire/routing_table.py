"""The routing table, which control sends to every ingress as a whole whenever it changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from llmrun.wire import KeyInfo, State
from llmrun_runtime.wire.message import Message


@dataclass(frozen=True)
class ReplicaRoute(Message):
    """The address of one replica's engine for links from ingresses, and the token that it requires."""

    id: str
    host: str
    port: int
    token: str = field(repr=False)
    adapters: frozenset[str] = frozenset()
    """The pins of the adapters that it has loaded."""


@dataclass(frozen=True)
class ModelRoute(Message):
    """One model: the replicas of its active version, its limits, and why it has no replica."""

    name: str
    app: str
    version: int
    state: State
    created: int
    names: tuple[str, ...]
    paths: frozenset[str]
    max_ongoing: int
    replicas: tuple[ReplicaRoute, ...] = ()
    failures: int = 0
    """This version's failed starts in a row."""
    paused: bool = False
    """Whether no start is tried now: requests fail at once with `cause`."""
    cause: str = ""
    """Why the last start failed, or why there is no replica yet."""
    phase: str = ""
    """While it wakes: the current phase, in a few words."""
    usual_start: float = 0
    """The median of its last cold starts in seconds; 0 if there are none."""
    max_queued: int = 1000
    """How many requests may wait for it."""
    rpm: int = 0
    """Requests per minute. 0 is no limit, also in `tpm` and `max_in_flight`."""
    tpm: int = 0
    """Tokens per minute."""
    max_in_flight: int = 0
    """Requests that wait or are being served."""
    max_output_tokens: int = 0
    """Tokens that one request may generate. 0 is no limit."""
    max_model_len: int = 0
    """Tokens of a prompt and its completion together; 0 until an engine has reported it."""
    log_engine_metrics: bool = True
    """Whether the engines' own metrics are exported."""
    lora: bool = False
    """Whether the model has the option `lora=`."""
    adapters: dict[str, str] | None = None
    """Pins of adapters by name; None until they have been listed."""
    adapters_error: str = ""
    """Why they could not be listed."""


@dataclass(frozen=True)
class Table(Message):
    """All models by name. `epoch` identifies one run of control; `number` increases within it."""

    epoch: str = ""
    number: int = 0
    models: dict[str, ModelRoute] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Every name and alias that clients may use → the model's name."""
    control: tuple[str, int] = ("", 0)
    """The address of control's HTTP API."""
    keys: dict[str, KeyInfo] = field(default_factory=dict)
    """API keys by digest."""
    admin: str = ""
    """The digest of the admin key."""
    keys_required: bool = False
    """Whether requests need an API key although none may exist."""


def share_of(table: Table, ingresses: int) -> Table:
    """Return the table for one of several ingresses: its share, rounded up, of each model's concurrency limits."""

    def share(limit: int) -> int:
        return -(-limit // ingresses)

    models = {
        name: replace(model, max_ongoing=share(model.max_ongoing), max_queued=share(model.max_queued))
        for name, model in table.models.items()
    }
    return replace(table, models=models)


def by_names(models: dict[str, ModelRoute]) -> dict[str, str]:
    """Return the index of all names and aliases."""
    return {served: model.name for model in models.values() for served in model.names}
