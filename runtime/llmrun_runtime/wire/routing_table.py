"""The routing table: what control tells every ingress, whole, whenever it changes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from llmrun.wire import KeyInfo, State


@dataclass(frozen=True)
class ReplicaRoute:
    """Where one replica's engine listens for ingresses, and the token that it asks for."""

    id: str
    host: str
    port: int
    token: str = field(repr=False)
    adapters: frozenset[str] = frozenset()
    """The pins of the adapters that it has loaded."""


@dataclass(frozen=True)
class ModelRoute:
    """One model: the replicas of its version in force, and what to tell callers while it has none."""

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
    """Failed starts of this version so far; grows by one with each."""
    paused: bool = False
    """No start is tried now; whoever asks hears `cause` at once."""
    cause: str = ""
    """Why the last start failed, or why there is no replica yet."""
    phase: str = ""
    """While it wakes: what it is at, in a few words."""
    usual_start: float = 0
    """Seconds that its last cold starts took, their median; 0 where there were none."""
    max_queued: int = 1000
    """Requests that may wait for it."""
    rpm: int = 0
    """Requests a minute; 0 is no limit, as of `tpm` and `max_in_flight`."""
    tpm: int = 0
    """Tokens a minute."""
    max_in_flight: int = 0
    """Requests that wait or are answered."""
    max_model_len: int = 0
    """Tokens of a prompt and its answer together; 0 before an engine has said it."""
    log_engine_metrics: bool = True
    """Whether its engines' own metrics are shown."""
    lora: bool = False
    """Whether it has adapters at all."""
    adapters: dict[str, str] | None = None
    """Their pins by name; None while nobody knows them."""
    adapters_trouble: str = ""
    """Why nobody knows them."""


@dataclass(frozen=True)
class Table:
    """All models by name. `epoch` names one life of control; `number` grows within it."""

    epoch: str = ""
    number: int = 0
    models: dict[str, ModelRoute] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Every name that clients may ask for → the model's name."""
    control: tuple[str, int] = ("", 0)
    """Where control's HTTP API listens."""
    keys: dict[str, KeyInfo] = field(default_factory=dict)
    """API keys by `digest_of` them."""
    admin: str = ""
    """The digest of the admin key."""


def share_of(table: Table, ingresses: int) -> Table:
    """The table of one of several ingresses: each lets in its share, rounded up, of what may be asked at once."""

    def share(limit: int) -> int:
        return -(-limit // ingresses)

    models = {
        name: replace(model, max_ongoing=share(model.max_ongoing), max_queued=share(model.max_queued))
        for name, model in table.models.items()
    }
    return replace(table, models=models)


def digest_of(key: str) -> str:
    """What is known of a key (hex, sha256: a key has 256 random bits, so that a slow hash would add nothing).

    Who looks a digest up learns from the time it takes nothing that leads to a key.
    """
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def by_names(models: dict[str, ModelRoute]) -> dict[str, str]:
    """The index of all names and aliases."""
    return {served: model.name for model in models.values() for served in model.names}
