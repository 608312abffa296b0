"""Which model a request is for, and whether it may go on. Pure: body and table in, a route or a Refusal out."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import python_multipart
from rapidfuzz import fuzz, process

from llmrun.lora import REVISION, split_revision
from llmrun_runtime.asgi import Scope, error_body
from llmrun_runtime.ingress.dialects import mended
from llmrun_runtime.table import ModelRoute, Table

MAX_WAIT = b"x-llmrun-max-wait"
PROMPTS = (b'"messages"', b'"prompt"', b'"input"')
# Shorter prompts are not worth a cache.
PREFIX_BYTES = 1024
ROUTED = ("model", "stream")
# Per cent of two names that are alike: less is no typing error.
ALIKE = 60
# The code of a Refusal: no replica answers now.
NOT_READY = "model_not_ready"


@dataclass
class Refusal(Exception):
    """An answer in OpenAI's error shape instead of the model's."""

    status: int
    text: str
    code: str
    kind: str = "invalid_request_error"
    param: str | None = None
    retry_after: int | None = None

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        return error_body(self.text, self.kind, self.code, self.param)


@dataclass(frozen=True)
class Asked:
    """What is read of a body: nothing else is looked at before the engine does."""

    model: str
    stream: bool
    prefix: bytes = b""
    """How its prompt begins, for routing; b"" of a short one."""
    mended: bytes = b""
    """What the engine gets instead; b"" where that is the body as it came."""


def read_request(body: bytes, content_type: bytes = b"application/json") -> Asked:
    """Read `model` and `stream` of a body: JSON, or a multipart form. Raises Refusal."""
    if content_type.lower().startswith(b"multipart/form-data"):
        return _read_form(body, content_type)
    try:
        parsed = json.loads(body)
        twice = _written_twice(body) if isinstance(parsed, dict) else None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}", "invalid_json") from None
    if not isinstance(parsed, dict):
        raise Refusal(400, f"the body must be a JSON object, not {type(parsed).__name__}", "invalid_json")
    if twice:
        raise Refusal(400, f"the body has {twice!r} more than once: say it once", "duplicate_key", param=twice)
    other = mended(parsed)
    sent = json.dumps(other, ensure_ascii=False).encode() if other else b""
    return Asked(_model_of(parsed), parsed.get("stream") is True, _prefix(body), sent)


def _prefix(body: bytes) -> bytes:
    """The first PREFIX_BYTES of a long prompt as the client wrote it: what turns of one conversation have in common."""
    at = next((at for field in PROMPTS if (at := body.find(field)) >= 0), len(body))
    return body[at : at + PREFIX_BYTES] if at + PREFIX_BYTES <= len(body) else b""


def _model_of(parsed: Mapping[str, Any]) -> str:
    model = parsed.get("model")
    if model is None:
        raise Refusal(400, "the body has no 'model': name one of GET /v1/models", "missing_model", param="model")
    if not isinstance(model, str):
        raise Refusal(400, f"'model' must be a string, not {type(model).__name__}", "invalid_model", param="model")
    return model


def _read_form(body: bytes, content_type: bytes) -> Asked:
    """The form fields of ROUTED; files are the engine's."""
    fields: dict[str, str] = {}

    def keep(field: Any) -> None:
        name = (field.field_name or b"").decode("latin-1")
        if name in ROUTED:
            if name in fields:
                raise Refusal(400, f"the form has {name!r} more than once: say it once", "duplicate_key", param=name)
            fields[name] = (field.value or b"").decode(errors="replace")

    try:
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)).encode()}
        python_multipart.parse_form(headers, io.BytesIO(body), keep, lambda file: file.close())
    except (python_multipart.exceptions.FormParserError, ValueError) as error:
        raise Refusal(400, f"the body is no multipart form: {error}", "invalid_form") from None
    return Asked(_model_of(fields), fields.get("stream", "").lower() in ("true", "1"))


def _written_twice(body: bytes) -> str | None:
    """Which of ROUTED the outermost object has more than once: parsers differ in which one counts."""
    # The exact look calls Python for each object; most bodies show at a glance that they need none.
    if b"\\u" not in body and not any(body.count(f'"{key}"'.encode()) > 1 for key in ROUTED):
        return None
    top: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        nonlocal top
        top = pairs  # objects come innermost first: the last one is the body itself

    json.loads(body, object_pairs_hook=keep)
    names = [name for name, _ in top]
    return next((key for key in ROUTED if names.count(key) > 1), None)


def read_max_wait(scope: Scope) -> float | None:
    """Seconds that the caller lets its request wait (`X-LLMRun-Max-Wait`); None if it does not say. Raises Refusal."""
    said = dict(scope["headers"]).get(MAX_WAIT)
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        text = f"X-LLMRun-Max-Wait: {said.decode('latin-1')!r} is no number of seconds, 0 or more"
        raise Refusal(400, text, "invalid_header")
    return seconds


class Seen(Protocol):
    """Whether the caller may know of a model, or of one of its adapters."""

    def __call__(self, model: ModelRoute, adapter: str = "", /) -> bool:
        """Whether it may."""
        ...


def everything(model: ModelRoute, adapter: str = "", /) -> bool:
    """See Seen: the caller may know of all there is."""
    return True


def find_model(table: Table, name: str, seen: Seen = everything) -> ModelRoute:
    """The model that clients call `name`. Raises Refusal, saying what there is, as far as it may be `seen`."""
    model = table.names.get(name)
    if model is not None:
        return table.models[model]
    raise no_model(name, [name for model in table.models.values() if seen(model) for name in model.names])


def no_model(name: str, names: Collection[str]) -> Refusal:
    """There is no model `name`; `names` are those that there are."""
    text = f"the model {name!r} does not exist: "
    if names:
        near = close_names(name, names, 1)
        text += f"did you mean {near[0]!r}? " if near else ""
        text += f"there are {', '.join(sorted(names))}"
    else:
        text += "nothing is deployed"
    return Refusal(404, text, "model_not_found", param="model")


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


def find_target(table: Table, name: str, seen: Seen = everything) -> Target:
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
        raise Refusal(404, text, "model_not_found", param="model")
    if model.adapters is None:
        why = model.adapters_trouble or "they are being listed"
        text = f"which adapters {model.name} has is not known yet: {why}"
        raise Refusal(503, text, "adapters_unknown", "service_unavailable", param="model", retry_after=2)
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
        raise Refusal(404, text, "model_not_found", param="model")
    return Target(model, base, adapter, pin)


def listed_adapters(model: ModelRoute) -> Iterator[str]:
    """Their names, without the revisions that callers have named."""
    return (name for name in model.adapters or () if not split_revision(name)[1])


def close_names(name: str, names: Iterable[str], most: int) -> list[str]:
    """Those of `names` that may have been meant, the likeliest first (10,000 names: 3 ms; difflib takes 170)."""
    found = process.extract(name, names, scorer=fuzz.ratio, limit=most, score_cutoff=ALIKE)
    return [other for other, _, _ in found]


def check_method(method: str, path: str, *allowed: str) -> None:
    """Raises Refusal, naming the first one, unless `method` is among those `allowed`."""
    if method not in allowed:
        raise Refusal(405, f"{path} takes {allowed[0]}", "method_not_allowed")


def check_path(model: ModelRoute | None, path: str) -> None:
    """Raises Refusal if the model's engine does not speak `path`."""
    if model and path not in model.paths:
        raise no_path(model.name, path, model.paths)


def no_path(model: str, path: str, paths: Iterable[str]) -> Refusal:
    """A model's engine speaks `paths`, and not this one."""
    return Refusal(404, f"{model} has no {path}: it has {', '.join(sorted(paths))}", "path_not_found")
