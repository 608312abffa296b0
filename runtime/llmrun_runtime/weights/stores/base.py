"""The interface that all stores share, and the choice of a store for a source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from llmrun.weights import Weights
from llmrun_runtime.weights.pin import File, Pin
from llmrun_runtime.weights.stores.ranges import Reader


class Store(Protocol):
    """A source in its store."""

    reader: Reader

    def pin(self) -> Pin:
        """Pin the source's current content: the files that an engine needs. Raises WeightsError."""
        ...

    def list_files(self) -> Pin:
        """Pin all files that the source has now. Raises WeightsError."""
        ...

    def check_published(self) -> None:
        """Raise NotFound unless the source's owner has published the revision; WeightsError if that is not known."""
        ...

    def use_pin(self, pin: Pin) -> None:
        """Read the files of that pin from now on."""
        ...

    def local_copy(self, file: File) -> Path | None:
        """Return a copy of the file on this node, outside of our cache; the caller must check its digest."""
        ...


# Names of the variables in a model's `env=`, separated by commas.
MODEL_VARIABLES = "LLMRUN_MODEL_VARIABLES"


def may_send(endpoint_url: str, *variables: str) -> bool:
    """Whether a credential that its holder can use elsewhere, a token, may go to a source's endpoint.

    A node's own one goes to the store's usual address only, not to a place that an app file names; one that the
    model's `env=` gives by one of these variables goes wherever the model's source is.
    """
    return not endpoint_url or bool(set(variables) & set(os.environ.get(MODEL_VARIABLES, "").split(",")))


def open_store(weights: Weights, connections: int = 8) -> Store:
    """Return the store of a source; a path is an object store too. Each store imports its packages lazily."""
    if weights.kind == "hub":
        from llmrun_runtime.weights.stores.hub import HubStore  # noqa: PLC0415

        return HubStore(weights, connections)
    from llmrun_runtime.weights.stores.objects import ObjectStore  # noqa: PLC0415

    return ObjectStore(weights, connections)
