"""The tasks that a node agent sends to its weights workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter

from llmrun.weights import AnyWeights
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.weights.pin import Pin


class PinTask(BaseModel):
    """Pin a source. Result: a Pin."""

    kind: Literal["pin"] = "pin"
    weights: AnyWeights


class ListAdaptersTask(BaseModel):
    """List the adapters at a source. Result: an AdapterListing."""

    kind: Literal["list_adapters"] = "list_adapters"
    weights: AnyWeights
    known_ranks: dict[str, int] | None
    """See `list_adapters`."""
    known: str = ""
    """The digest of the listing that the caller knows."""
    published: bool = False
    """Whether the revision is a stranger's choice: see `Store.check_published`."""


class FetchTask(BaseModel):
    """Fetch a pin into the cache. Result: its folder."""

    kind: Literal["fetch"] = "fetch"
    pin: Pin
    peers: tuple[Peer, ...] = ()
    keep: tuple[str, ...] = ()


class ImportTask(BaseModel):
    """Import a folder of this node into the cache. Result: a Pin."""

    kind: Literal["import"] = "import"
    folder: str
    weights: AnyWeights
    keep: tuple[str, ...] = ()


class VerifyTask(BaseModel):
    """Hash a pin's files again. Result: a list of problems."""

    kind: Literal["verify"] = "verify"
    pin: Pin


class MirrorTask(BaseModel):
    """Upload a pin from the cache to an object store. Result: the numbers of files; see `mirror`."""

    kind: Literal["mirror"] = "mirror"
    pin: Pin
    target: AnyWeights


class PushAdapterTask(BaseModel):
    """Copy an adapter from a folder of this node to `target`. Result: None."""

    kind: Literal["push_adapter"] = "push_adapter"
    folder: str
    target: AnyWeights


Task = Annotated[
    PinTask | ListAdaptersTask | FetchTask | ImportTask | VerifyTask | MirrorTask | PushAdapterTask,
    Field(discriminator="kind"),
]
task_adapter: TypeAdapter[Task] = TypeAdapter(Task)
