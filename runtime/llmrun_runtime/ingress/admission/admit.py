"""Which model a request is for, and whether it may go on. Pure: body and table in, a route or a Refusal out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from rapidfuzz import fuzz, process

from llmrun.lora import REVISION, split_revision
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.wire.routing_table import ModelRoute, Table

# Per cent of two names that are alike: less is no typing error.
ALIKE = 60


class Visibility(Protocol):
    """Whether the caller may know of a model, or of one of its adapters."""

    def __call__(self, model: ModelRoute, adapter: str = "", /) -> bool:
        """Whether it may."""
        ...


def everything(model: ModelRoute, adapter: str = "", /) -> bool:
    """See Seen: the caller may know of all there is."""
    return True


def find_model(table: Table, name: str, seen: Visibility = everything) -> ModelRoute:
    """The model that clients call `name`. Raises Refusal, saying what there is, as far as it may be `seen`."""
    model = table.names.get(name)
    if model is not None:
        return table.models[model]
    raise no_model(name, [name for model in table.models.values() if seen(model) for name in model.names])


def no_model(name: str, names: Collection[str]) -> HTTPError:
    """There is no model `name`; `names` are those that there are."""
    text = f"the model {name!r} does not exist: "
    if names:
        near = close_names(name, names, 1)
        text += f"did you mean {near[0]!r}? " if near else ""
        text += f"there are {', '.join(sorted(names))}"
    else:
        text += "nothing is deployed"
    return HTTPError(404, text, "model_not_found", param="model")


@dataclass(frozen=True)
class Target:
    """What a request is for."""

    model: ModelRoute
    name: str
    """The model's, as it was asked for."""
    adapter: str = ""
    """The adapter's name; "" for the model itself."""
    pin: str = ""
    """What that name means now; "" of a revision (`adapter@revision`) that control has yet to be asked for."""


def find_target(table: Table, name: str, seen: Visibility = everything) -> Target:
    """The model, or the adapter of one (`model:adapter`), that clients call `name`. Raises Refusal.

    1. A model's own name.
    2. Else what is before the first `:` is a model's; it has adapters, and they are known.
    3. The rest is one of them, or a revision of one.
    """
    # 1.
    base, colon, adapter = name.partition(":")
    if name in table.names or not colon or base not in table.names:
        return Target(find_model(table, name, seen), name)
    # 2.
    model = find_model(table, base, seen)
    if not model.lora:
        text = f"the model {name!r} does not exist: {model.name} has no adapters (lora=)"
        raise HTTPError(404, text, "model_not_found", param="model")
    if model.adapters is None:
        why = model.adapters_trouble or "they are being listed"
        text = f"which adapters {model.name} has is not known yet: {why}"
        raise HTTPError(503, text, "adapters_unknown", "service_unavailable", param="model", retry_after=2)
    # 3.
    pin = model.adapters.get(adapter)
    if pin is None:
        plain, revision = split_revision(adapter)
        if plain in model.adapters and REVISION.fullmatch(revision):
            return Target(model, base, adapter)
        known = [other for other in listed_adapters(model) if seen(model, other)]
        near = close_names(plain, known, 3)
        some = ", ".join(f"{model.name}:{other}" for other in near)
        hint = f"did you mean {some}?" if near else f"it has {len(known)}, which GET /v1/models lists"
        text = f"{model.name} has no adapter {adapter!r}: {hint}"
        raise HTTPError(404, text, "model_not_found", param="model")
    return Target(model, base, adapter, pin)


def listed_adapters(model: ModelRoute) -> Iterator[str]:
    """Their names, without the revisions that callers have named."""
    return (name for name in model.adapters or () if not split_revision(name)[1])


def close_names(name: str, names: Iterable[str], most: int) -> list[str]:
    """Those of `names` that may have been meant, the likeliest first (10,000 names: 3 ms; difflib takes 170)."""
    found = process.extract(name, names, scorer=fuzz.ratio, limit=most, score_cutoff=ALIKE)
    return [other for other, _, _ in found]


def check_path(model: ModelRoute | None, path: str) -> None:
    """Raises Refusal if the model's engine does not speak `path`."""
    if model and path not in model.paths:
        raise no_path(model.name, path, model.paths)


def no_path(model: str, path: str, paths: Iterable[str]) -> HTTPError:
    """A model's engine speaks `paths`, and not this one."""
    return HTTPError(404, f"{model} has no {path}: it has {', '.join(sorted(paths))}", "path_not_found")
