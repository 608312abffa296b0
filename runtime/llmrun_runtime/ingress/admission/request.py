"""Reads what the ingress needs of a request: model, streaming, prompt prefix, maximum wait."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import python_multipart

from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.admission.compat import mended
from llmrun_runtime.ingress.errors import HTTPError

MAX_WAIT = b"x-llmrun-max-wait"
PROMPTS = (b'"messages"', b'"prompt"', b'"input"')
# Shorter prompts are not worth a cache.
PREFIX_BYTES = 1024
ROUTED = ("model", "stream")


@dataclass(frozen=True)
class ParsedRequest:
    """What is read of a body: nothing else is looked at before the engine does."""

    model: str
    stream: bool
    prefix: bytes = b""
    """How its prompt begins, for routing; b"" of a short one."""
    mended: bytes = b""
    """What the engine gets instead; b"" where that is the body as it came."""


def read_request(body: bytes, content_type: bytes = b"application/json") -> ParsedRequest:
    """Read `model` and `stream` of a body: JSON, or a multipart form. Raises Refusal."""
    if content_type.lower().startswith(b"multipart/form-data"):
        return _read_form(body, content_type)
    try:
        parsed = json.loads(body)
        twice = _written_twice(body) if isinstance(parsed, dict) else None
    except (ValueError, RecursionError) as error:
        raise HTTPError(400, f"the body is no JSON: {error}", "invalid_json") from None
    if not isinstance(parsed, dict):
        raise HTTPError(400, f"the body must be a JSON object, not {type(parsed).__name__}", "invalid_json")
    if twice:
        raise HTTPError(400, f"the body has {twice!r} more than once: say it once", "duplicate_key", param=twice)
    other = mended(parsed)
    sent = json.dumps(other, ensure_ascii=False).encode() if other else b""
    return ParsedRequest(_model_of(parsed), parsed.get("stream") is True, _prefix(body), sent)


def _prefix(body: bytes) -> bytes:
    """The first PREFIX_BYTES of a long prompt as the client wrote it: what turns of one conversation have in common."""
    at = next((at for field in PROMPTS if (at := body.find(field)) >= 0), len(body))
    return body[at : at + PREFIX_BYTES] if at + PREFIX_BYTES <= len(body) else b""


def _model_of(parsed: Mapping[str, Any]) -> str:
    model = parsed.get("model")
    if model is None:
        raise HTTPError(400, "the body has no 'model': name one of GET /v1/models", "missing_model", param="model")
    if not isinstance(model, str):
        raise HTTPError(400, f"'model' must be a string, not {type(model).__name__}", "invalid_model", param="model")
    return model


def _read_form(body: bytes, content_type: bytes) -> ParsedRequest:
    """The form fields of ROUTED; files are the engine's."""
    fields: dict[str, str] = {}

    def keep(field: Any) -> None:
        name = (field.field_name or b"").decode("latin-1")
        if name in ROUTED:
            if name in fields:
                raise HTTPError(400, f"the form has {name!r} more than once: say it once", "duplicate_key", param=name)
            fields[name] = (field.value or b"").decode(errors="replace")

    try:
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)).encode()}
        python_multipart.parse_form(headers, io.BytesIO(body), keep, lambda file: file.close())
    except (python_multipart.exceptions.FormParserError, ValueError) as error:
        raise HTTPError(400, f"the body is no multipart form: {error}", "invalid_form") from None
    return ParsedRequest(_model_of(fields), fields.get("stream", "").lower() in ("true", "1"))


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
        raise HTTPError(400, text, "invalid_header")
    return seconds


def check_method(method: str, path: str, *allowed: str) -> None:
    """Raises Refusal, naming the first one, unless `method` is among those `allowed`."""
    if method not in allowed:
        raise HTTPError(405, f"{path} takes {allowed[0]}", "method_not_allowed")
