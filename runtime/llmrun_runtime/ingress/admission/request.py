"""Parses what the ingress needs from a request: model, streaming, prompt prefix, maximum wait."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import python_multipart

from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.admission.auth import KEY_HEADERS
from llmrun_runtime.ingress.admission.compat import normalize
from llmrun_runtime.ingress.admission.output_tokens import UNKNOWN, Wanted
from llmrun_runtime.ingress.admission.text import check_text
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.wire.reports import PRIORITIES

MAX_WAIT_HEADER = "X-LLMRun-Max-Wait"
_MAX_WAIT = MAX_WAIT_HEADER.lower().encode()
PRIORITY_HEADER = "X-LLMRun-Priority"
COMMENTS_HEADER = "X-LLMRun-Comments"
_PRIORITY = PRIORITY_HEADER.lower().encode()
PROMPT_KEYS = (b'"messages"', b'"prompt"', b'"input"')
# Routing by prefix pays off only for prompts of this length.
PREFIX_BYTES = 1024
ROUTING_KEYS = ("model", "stream")
# What engines take for true in a JSON body (pydantic's rules).
TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
FALSE = frozenset({"0", "off", "f", "false", "n", "no", ""})
# Of /v1/responses: what asks for a response that is kept.
KEPT = ("previous_response_id", "conversation", "background", "store")
# Whoever reads a header that is sent twice takes the first or the last value: two readers would see two requests.
SINGLE_HEADERS = (b"content-type", b"content-length", b"content-encoding", b"authorization", *KEY_HEADERS)
# Parsing more bytes than this takes so long that it would delay other requests.
LARGE_BYTES = 256 * 2**10
# Python's parser holds the interpreter, and with it all streams. For as many values as 32 MiB can have, that would be
# seconds and a GiB of memory; with these limits, it is a fraction of a second. Commas in texts count, too.
MAX_CONTAINERS = 250_000
MAX_COMMAS = 2_000_000
MAX_KEYS = 250_000
_KEY = re.compile(rb'"\s*:')


def _spelling(key: str) -> re.Pattern[bytes]:
    """Return a pattern for the key in a JSON body, with or without escapes."""
    letters = (rf"(?:{letter}|\\u00(?i:{ord(letter):02x}))" for letter in key)
    return re.compile(rf'"{"".join(letters)}"\s*:'.encode())


_SPELLINGS = tuple(map(_spelling, ROUTING_KEYS))


@dataclass(frozen=True)
class ParsedRequest:
    """The parts of a body that the ingress uses; the engine validates the rest."""

    model: str
    stream: bool
    prefix: bytes = b""
    """The start of the prompt, for routing; b"" for a short one."""
    normalized: bytes = b""
    """The body to send to the engine; b"" for the original one."""
    wanted: Wanted = UNKNOWN
    """What it says about its output."""
    kept: str = ""
    """The field of KEPT that it sets; "" for none."""


def parse_request(body: bytes, content_type: bytes = b"application/json", deployment: str = "") -> ParsedRequest:
    """Parse a JSON body or a multipart form. Raises HTTPError (400).

    `deployment`: the model that the path names, over the one in a JSON body; "" if it names none.
    """
    if content_type.lower().startswith(b"multipart/form-data"):
        return _parse_form(body, content_type, deployment)
    _check_size(body)
    try:
        parsed = json.loads(body)
        duplicate = _duplicate_key(body) if isinstance(parsed, dict) else None
    except (ValueError, RecursionError) as error:
        raise HTTPError(400, f"request body is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(parsed, dict):
        message = f"request body must be a JSON object, not {type(parsed).__name__}"
        raise HTTPError(400, message, "invalid_json")
    if duplicate:
        raise HTTPError(400, f"duplicate key {duplicate!r} in the request body", "duplicate_key", param=duplicate)
    check_text(body, parsed)
    is_renamed = bool(deployment) and parsed.get("model") != deployment
    if is_renamed:
        parsed["model"] = deployment
    normalized = normalize(parsed) or (parsed if is_renamed else None)
    encoded = json.dumps(normalized, ensure_ascii=False).encode() if normalized else b""
    kept = next((name for name in KEPT if parsed.get(name) and _is_set(parsed[name])), "")
    stream = _is_true(parsed.get("stream"))
    return ParsedRequest(_model_of(parsed), stream, _prefix(body), encoded, Wanted.of(parsed), kept)


def _is_true(value: Any) -> bool:
    return value in (True, 1) if isinstance(value, bool | int | float) else str(value).lower() in TRUE


def _is_set(value: Any) -> bool:
    """Whether a field asks for something: a flag may also be written as "false"."""
    return not isinstance(value, str) or value.lower() not in FALSE


def _check_size(body: bytes) -> None:
    """Raise HTTPError (400) for a body with so many values that parsing it would delay other requests."""
    if len(body) <= LARGE_BYTES:
        return
    many = body.count(b"[") + body.count(b"{") > MAX_CONTAINERS or body.count(b",") > MAX_COMMAS
    many = many or (body.count(b":") > MAX_KEYS and any(islice(_KEY.finditer(body), MAX_KEYS, None)))
    if many:
        message = (
            f"request body has over {MAX_CONTAINERS:,} objects and arrays, {MAX_KEYS:,} keys or {MAX_COMMAS:,} values. "
            f"Split it"
        )
        raise HTTPError(400, message, "too_many_values")


def _prefix(body: bytes) -> bytes:
    """Return the first PREFIX_BYTES of a long prompt as sent: the turns of one conversation have them in common."""
    at = next((at for key in PROMPT_KEYS if (at := body.find(key)) >= 0), len(body))
    return body[at : at + PREFIX_BYTES] if at + PREFIX_BYTES <= len(body) else b""


def _model_of(parsed: Mapping[str, Any]) -> str:
    model = parsed.get("model")
    if model is None:
        raise HTTPError(400, "'model' is required. Available: see GET /v1/models", "missing_model", param="model")
    if not isinstance(model, str):
        raise HTTPError(400, f"'model' must be a string, not {type(model).__name__}", "invalid_model", param="model")
    return model


def _parse_form(body: bytes, content_type: bytes, deployment: str) -> ParsedRequest:
    """Parse the form fields in ROUTING_KEYS; the engine reads the files. Raises HTTPError (400)."""
    fields: dict[str, str] = {}

    def on_field(field: Any) -> None:
        name = (field.field_name or b"").decode("latin-1")
        if name in ROUTING_KEYS:
            if name in fields:
                raise HTTPError(400, f"duplicate key {name!r} in the form", "duplicate_key", param=name)
            fields[name] = (field.value or b"").decode(errors="replace")

    try:
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)).encode()}
        python_multipart.parse_form(headers, io.BytesIO(body), on_field, lambda file: file.close())
    except (python_multipart.exceptions.FormParserError, ValueError) as error:
        raise HTTPError(400, f"request body is not a valid multipart form: {error}", "invalid_form") from None
    if deployment and fields.get("model") != deployment:
        message = f"the form's field 'model' must be {deployment!r}, as in the path"
        raise HTTPError(400, message, "invalid_model", param="model")
    return ParsedRequest(_model_of(fields), _is_true(fields.get("stream")))


def _duplicate_key(body: bytes) -> str | None:
    """Return a key of ROUTING_KEYS that the outermost object has twice: parsers disagree on which value counts."""
    # The exact check calls Python for each object; this quick one is enough for most bodies.
    if not any(sum(1 for _ in islice(spelling.finditer(body), 2)) > 1 for spelling in _SPELLINGS):
        return None
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        nonlocal outermost
        outermost = pairs  # innermost objects come first, the body itself last

    json.loads(body, object_pairs_hook=keep)
    names = [name for name, _ in outermost]
    return next((key for key in ROUTING_KEYS if names.count(key) > 1), None)


def parse_max_wait(scope: Scope) -> float | None:
    """Return the value of `X-LLMRun-Max-Wait` in seconds; None without the header. Raises HTTPError (400)."""
    value = dict(scope["headers"]).get(_MAX_WAIT)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        message = f"invalid value for {MAX_WAIT_HEADER}: {value.decode('latin-1')!r} must be a number of seconds >= 0"
        raise HTTPError(400, message, "invalid_header")
    return seconds


def parse_priority(scope: Scope) -> int:
    """Return the index in PRIORITIES of `X-LLMRun-Priority`; that of `normal` without it. Raises HTTPError (400)."""
    value = dict(scope["headers"]).get(_PRIORITY, b"normal").decode("latin-1")
    for index, priority in enumerate(PRIORITIES):
        if value == priority:
            return index
    message = f"invalid value for {PRIORITY_HEADER}: {value!r} must be high, normal or batch"
    raise HTTPError(400, message, "invalid_header")


def parse_comments(scope: Scope) -> bool | None:
    """Return whether `X-LLMRun-Comments` is on; None without it. Raises HTTPError (400)."""
    value = dict(scope["headers"]).get(COMMENTS_HEADER.lower().encode(), b"").decode("latin-1").lower()
    if value not in ("", "on", "off"):
        raise HTTPError(400, f"invalid value for {COMMENTS_HEADER}: {value!r} must be on or off", "invalid_header")
    return value == "on" if value else None


def check_headers(scope: Scope) -> None:
    """Raise HTTPError (400) if the request repeats one of SINGLE_HEADERS."""
    names = [name for name, _ in scope["headers"]]
    for name in SINGLE_HEADERS:
        if names.count(name) > 1:
            raise HTTPError(400, f"header {name.decode()} must not be repeated: send it once", "invalid_header")


def check_method(method: str, path: str, *allowed: str) -> None:
    """Raise HTTPError (405) unless `method` is `allowed`."""
    if method not in allowed:
        raise HTTPError(405, f"method not allowed: {path} requires {allowed[0]}", "method_not_allowed")
