"""The deployed models, and the versions that are not active yet. In memory; used by one thread."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from llmrun.errors import Refused
from llmrun.spec import ModelSpec
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.pin import Pin


@dataclass(frozen=True)
class Deployed:
    """One version of a model, as it was deployed."""

    app: str
    version: int
    engine_version: int
    spec: ModelSpec
    placement: Placement
    proven: bool
    pin: Pin | None = None
    """None for weights that are used in place."""
    created: float = field(default_factory=time.time)
    """Unix time."""

    @property
    def name(self) -> str:
        """The model's public name."""
        return self.spec.name


@dataclass(frozen=True)
class Candidate:
    """A version that is not active: its proof is running, or `cause` says why it failed."""

    row: Deployed
    cause: str = ""


class Models:
    """The active version of each model, the candidates, and the models locked by a deploy."""

    def __init__(self) -> None:
        self.deployed: dict[str, Deployed] = {}
        """The active versions, by model name."""
        self.candidates: dict[str, Candidate] = {}
        """By model name. A model can have both an active version and a candidate."""
        self._locked: set[str] = set()

    def get(self, name: str) -> Deployed | None:
        """Return the active version of a model, by the model's own name."""
        return self.deployed.get(name)

    def put(self, row: Deployed) -> Deployed | None:
        """Make a version the active one. Return the version that it replaces."""
        previous = self.deployed.get(row.name)
        self.deployed[row.name] = row
        self.candidates.pop(row.name, None)
        return previous

    def mark_proven(self, name: str) -> Deployed:
        """Mark the active version as proven. Return it."""
        row = self.deployed[name] = replace(self.deployed[name], proven=True)
        return row

    def remove(self, name: str) -> None:
        """Remove a model's active version, if it has one."""
        self.deployed.pop(name, None)

    def lock(self, name: str) -> None:
        """Reserve a model for a deploy: the autoscaler leaves its target alone until `unlock`."""
        self._locked.add(name)

    def unlock(self, name: str) -> None:
        """Release a model. Does nothing if it is not locked."""
        self._locked.discard(name)

    def is_locked(self, name: str) -> bool:
        """Whether a deploy has locked the model."""
        return name in self._locked

    def resolve(self, name: str) -> str:
        """Return the name of the model, deployed or candidate, with that name or alias. Raises Refused (404)."""
        rows = [*self.deployed.values(), *(candidate.row for candidate in self.candidates.values())]
        for row in rows:
            if name in row.spec.served_names:
                return row.name
        available = ", ".join(sorted({row.name for row in rows})) or "none"
        raise Refused(f"model {name!r} not found; available: {available}", 404)

    def resolve_unlocked(self, name: str) -> Deployed:
        """Return the active version of the model with that name or alias.

        Raises Refused: 404 if there is no such model, 409 if it has no active version or a deploy has locked it.
        """
        model = self.resolve(name)
        row = self.deployed.get(model)
        if row is None:
            raise Refused(f"{model} has no active version. Deploy it first", 409)
        if self.is_locked(model):
            raise Refused(f"{model} is locked by a running deploy. Try again when the deploy has finished", 409)
        return row
