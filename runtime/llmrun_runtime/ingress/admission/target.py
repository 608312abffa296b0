"""Looks up the model or adapter that a request names. Pure: routing table and name in, a `Target` or HTTPError out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from rapidfuzz import fuzz, process

from llmrun.lora import REVISION, split_revision
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.wire.routing_table import ModelRoute, Table

# Minimum similarity, in per cent, of a name that an error message suggests.
MIN_SIMILARITY = 60


class Visibility(Protocol):
    """Decides whether the caller may see a model, or one of its adapters."""

    def __call__(self, model: ModelRoute, adapter: str = "", /) -> bool:
        """Whether it may."""
        ...


def everything(model: ModelRoute, adapter: str = "", /) -> bool:
    """A `Visibility` without restrictions."""
    return True


def find_model(table: Table, name: str, visible: Visibility = everything) -> ModelRoute:
    """Return the model with this name or alias, if it is visible. Raises HTTPError (404), which lists the visible."""
    model = table.models.get(table.names.get(name, ""))
    if model is not None and visible(model):
        return model
    raise model_not_found(name, [name for model in table.models.values() for name in _visible_names(model, visible)])


def _visible_names(model: ModelRoute, visible: Visibility) -> Iterator[str]:
    """The names that a caller may use; those of adapters only if it may not use the model itself."""
    if visible(model):
        yield from model.names
    else:
        yield from (f"{model.name}:{adapter}" for adapter in listed_adapters(model) if visible(model, adapter))


def model_not_found(name: str, available: Collection[str]) -> HTTPError:
    """The error for an unknown model name."""
    message = f"model {name!r} not found"
    if available:
        similar = similar_names(name, available, 1)
        message += f". Did you mean {similar[0]!r}?" if similar else "."
        message += f" Available: {', '.join(sorted(available))}"
    else:
        message += ": no models are available"
    return HTTPError(404, message, "model_not_found", param="model")


@dataclass(frozen=True)
class Target:
    """The model, and optionally the adapter, that a request names."""

    model: ModelRoute
    name: str
    """The model's name or alias in the request."""
    adapter: str = ""
    """The adapter's name; "" for the model itself."""
    pin: str = ""
    """The adapter's pin; "" for a revision (`adapter@revision`) that control must resolve first."""


def find_target(table: Table, name: str, visible: Visibility = everything) -> Target:
    """Return the model, or the adapter of a model (`model:adapter`), with this name. Raises HTTPError.

    1. The name of a model, as it is.
    2. Otherwise the part before the first `:` is a model with adapters, and their list is available. Before that
       nothing is said about an adapter that is not visible.
    3. The rest is the name of one of them, or of a revision of one.
    """
    # 1.
    base, colon, adapter = name.partition(":")
    if name in table.names or not colon or base not in table.names:
        return Target(find_model(table, name, visible), name)
    # 2.
    model = table.models[table.names[base]]
    if not visible(model, adapter):
        raise model_not_found(name, list(_visible_names(model, visible)))
    if not model.lora:
        message = f"model {name!r} not found: {model.name} has no adapters (lora= is not set)"
        raise HTTPError(404, message, "model_not_found", param="model")
    if model.adapters is None:
        message, cause = f"the adapters of {model.name} are not available yet", model.adapters_error
        message += "" if cause else ": they are being listed"
        code, kind = "adapters_unknown", "service_unavailable"
        raise HTTPError(503, message, code, kind, param="model", retry_after=2, cause=cause)
    # 3.
    pin = model.adapters.get(adapter)
    if pin is None:
        plain, revision = split_revision(adapter)
        if plain in model.adapters and REVISION.fullmatch(revision):
            return Target(model, base, adapter)
        raise _adapter_not_found(model, adapter, [other for other in listed_adapters(model) if visible(model, other)])
    return Target(model, base, adapter, pin)


def _adapter_not_found(model: ModelRoute, adapter: str, available: list[str]) -> HTTPError:
    similar = similar_names(split_revision(adapter)[0], available, 3)
    names = ", ".join(f"{model.name}:{other}" for other in similar)
    hint = f"Did you mean {names}?" if similar else f"Available: {len(available)} (see GET /v1/models)"
    return HTTPError(404, f"adapter {adapter!r} of {model.name} not found. {hint}", "model_not_found", param="model")


def listed_adapters(model: ModelRoute) -> Iterator[str]:
    """The names of a model's adapters, without the revisions that requests have named."""
    return (name for name in model.adapters or () if not split_revision(name)[1])


def similar_names(name: str, names: Iterable[str], limit: int) -> list[str]:
    """Return the most similar names, best first (3 ms for 10,000 names; difflib takes 170 ms)."""
    matches = process.extract(name, names, scorer=fuzz.ratio, limit=limit, score_cutoff=MIN_SIMILARITY)
    return [other for other, _, _ in matches]


def check_path(model: ModelRoute | None, path: str) -> None:
    """Raise HTTPError (404) if the model's engine does not serve `path`."""
    if model and path not in model.paths:
        raise path_not_supported(model.name, path, model.paths)


def path_not_supported(model: str, path: str, available: Iterable[str]) -> HTTPError:
    """The error for a path that the model's engine does not serve."""
    message = f"{model} does not support {path}. Available: {', '.join(sorted(available))}"
    return HTTPError(404, message, "path_not_found")
