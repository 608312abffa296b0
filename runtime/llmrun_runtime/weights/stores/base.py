"""Which store a source is in, behind one face."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from llmrun.weights import Weights
from llmrun_runtime.weights.pin import File, Pin
from llmrun_runtime.weights.stores.ranges import Reader


class Store(Protocol):
    """Where a source's files lie."""

    reader: Reader

    def pin(self) -> Pin:
        """What the source means now. Raises WeightsError."""
        ...

    def listed(self) -> Pin:
        """All files that the source has now, whatever is needed of them. Raises WeightsError."""
        ...

    def use(self, pin: Pin) -> None:
        """Read the files of that pin from now on."""
        ...

    def local(self, file: File) -> Path | None:
        """A file that lies on this node already, outside of our cache. It must be checked."""
        ...


def open_store(weights: Weights, connections: int = 8) -> Store:
    """The store of a source; a path is a store of files. Each imports its packages only when it is asked for."""
    if weights.kind == "hub":
        from llmrun_runtime.weights.stores.hub import HubStore  # noqa: PLC0415

        return HubStore(weights, connections)
    from llmrun_runtime.weights.stores.objects import ObjectStore  # noqa: PLC0415

    return ObjectStore(weights, connections)
