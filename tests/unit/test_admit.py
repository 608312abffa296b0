"""Admission of inference requests, without HTTP."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from llmrun.wire import ADMIN, KeyInfo
from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.admission.admit import Admission, admit
from llmrun_runtime.ingress.admission.auth import KEY_HEADERS
from llmrun_runtime.ingress.admission.request import PREFIX_BYTES, SINGLE_HEADERS, check_headers, parse_request
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.wire.reports import PRIORITIES
from llmrun_runtime.wire.routing_table import Table, by_names
from tests.support.ingress import CHAT, route

MODELS = {
    "one": route(1, rpm=5),
    "cold": route(name="cold", names=("cold",), state="cold"),
    "tuned": route(2, name="tuned", names=("tuned",), lora=True, adapters={"sql": "pin-1"}),
    "listing": route(3, name="listing", names=("listing",), lora=True, adapters_error="access denied"),
}
TABLE = Table("e", 1, MODELS, by_names(MODELS))
ONE_ONLY = KeyInfo(name="few", models=("one",))
PROBE = KeyInfo(name="probe", wake=False, max_in_flight=2)


def scope(path: str = CHAT, **headers: str) -> Scope:
    """Return a request's ASGI scope; `_` in header names becomes `-`."""
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": "POST", "path": path, "headers": pairs}


def body(model: str = "one", **fields: Any) -> bytes:
    """Return a request's body."""
    return json.dumps({"model": model, **fields}).encode()


def admit_body(table: Table, key: KeyInfo | None, request_scope: Scope, content: bytes) -> Admission:
    """Parse the body and admit the request."""
    content_type = dict(request_scope["headers"]).get(b"content-type", b"")
    return admit(table, key, request_scope, parse_request(content, content_type))


@pytest.mark.parametrize(
    ("key", "request_scope", "content", "status", "code"),
    [
        (None, scope(), b"{", 400, "invalid_json"),
        (None, scope(), b"[]", 400, "invalid_json"),
        (None, scope(), b"{}", 400, "missing_model"),
        (None, scope(), b'{"model": 1}', 400, "invalid_model"),
        (None, scope(), b'{"model": "one", "model": "cold"}', 400, "duplicate_key"),
        (None, scope(content_type="multipart/form-data"), b"--", 400, "invalid_form"),
        (None, scope(x_llmrun_max_wait="soon"), body(), 400, "invalid_header"),
        (None, scope(x_llmrun_priority="urgent"), body(), 400, "invalid_header"),
        (None, scope(), body("none"), 404, "model_not_found"),
        (None, scope(), body("one:sql"), 404, "model_not_found"),
        (None, scope(), body("tuned:none"), 404, "model_not_found"),
        (None, scope(), body("listing:sql"), 503, "adapters_unknown"),
        (None, scope("/v1/embeddings"), body(), 404, "path_not_found"),
        (ONE_ONLY, scope(), body("cold"), 404, "model_not_found"),
        (PROBE, scope(), body("cold"), 503, "model_not_ready"),
        # Two errors: the first rule decides.
        (None, scope(x_llmrun_max_wait="soon"), body("none"), 400, "invalid_header"),
        (ONE_ONLY, scope("/v1/embeddings"), body("cold"), 404, "model_not_found"),
        (PROBE, scope("/v1/embeddings"), body("cold"), 404, "path_not_found"),
    ],
)
def test_invalid_requests_are_rejected(
    key: KeyInfo | None, request_scope: Scope, content: bytes, status: int, code: str
) -> None:
    with pytest.raises(HTTPError) as error:
        admit_body(TABLE, key, request_scope, content)
    assert (error.value.status, error.value.code) == (status, code)


def test_an_admission_has_the_target_the_wait_limit_and_the_limits() -> None:
    admission = admit_body(TABLE, PROBE, scope(x_llmrun_max_wait="2.5"), body("org/one", stream=True))
    assert (admission.target.model, admission.target.name, admission.target.adapter) == (MODELS["one"], "org/one", "")
    assert admission.request.stream and admission.max_wait == 2.5 and admission.probe
    assert [limit.label for limit in admission.limits] == ["key probe", "model one"]


def test_a_request_without_a_key_is_admitted_with_the_models_limits() -> None:
    admission = admit_body(TABLE, None, scope(), body("cold"))
    assert not admission.limits and admission.max_wait is None and not admission.probe
    assert [limit.rpm for limit in admit_body(TABLE, None, scope(), body()).limits] == [5]


def test_an_adapter_without_a_revision_is_admitted_with_its_pin() -> None:
    targets = [admit_body(TABLE, None, scope(), body(f"tuned:{name}")).target for name in ("sql", "sql@v2")]
    assert [(target.adapter, target.pin) for target in targets] == [("sql", "pin-1"), ("sql@v2", "")]


def test_the_body_is_normalized_and_its_prefix_kept() -> None:
    schema = {"type": "json_schema", "json_schema": {"type": "object"}}
    assert b'"name": "answer"' in admit_body(TABLE, None, scope(), body(response_format=schema)).request.normalized
    request = admit_body(TABLE, None, scope(), body(prompt="x" * 2000)).request
    assert len(request.prefix) == PREFIX_BYTES and not request.normalized


def test_models_that_the_key_cannot_see_are_not_named() -> None:
    table = replace(TABLE, models={"cold": MODELS["cold"], "one": MODELS["one"]})
    with pytest.raises(HTTPError) as error:
        admit_body(table, ONE_ONLY, scope(), body("ona"))
    assert error.value.message == "model 'ona' not found. Did you mean 'one'? Available: one, org/one"


@pytest.mark.parametrize(
    ("key", "asked", "priority"),
    [
        (None, None, "normal"),
        (None, "high", "high"),
        (ADMIN, "high", "high"),
        (KeyInfo(name="usual"), "high", "normal"),
        (KeyInfo(name="usual"), "batch", "batch"),
        (KeyInfo(name="site", priority="high"), "high", "high"),
        (KeyInfo(name="site", priority="high"), None, "normal"),
        (KeyInfo(name="nightly", priority="batch"), None, "batch"),
    ],
)
def test_the_key_limits_the_priority(key: KeyInfo | None, asked: str | None, priority: str) -> None:
    headers = {"x_llmrun_priority": asked} if asked else {}
    assert PRIORITIES[admit_body(TABLE, key, scope(**headers), body()).priority] == priority


def test_headers_that_are_read_twice_are_sent_once() -> None:
    once = [(name, b"1") for name in (*SINGLE_HEADERS, b"accept", b"accept")]
    check_headers({"headers": once})
    assert {b"content-type", b"content-length", b"content-encoding", *KEY_HEADERS} <= set(SINGLE_HEADERS)
    for name in SINGLE_HEADERS:
        with pytest.raises(HTTPError, match=f"header {name.decode()} must not be repeated") as error:
            check_headers({"headers": [*once, (name, b"1")]})
        assert (error.value.status, error.value.code) == (400, "invalid_header")


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1", b'"ab"'])
def test_a_body_of_very_many_values_is_not_parsed(value: bytes) -> None:
    """32 MiB of empty lists would hold the interpreter for seconds, and take a GiB."""
    body = b'{"model": "m", "prompt": [' + b",".join([value] * (31 * 2**20 // (len(value) + 1))) + b"]}"
    started = time.process_time()
    with pytest.raises(HTTPError, match="250,000 objects and arrays") as error:
        parse_request(body)
    assert (error.value.status, error.value.code) == (400, "too_many_values")
    assert time.process_time() - started < 0.3


def test_a_large_text_is_parsed() -> None:
    body = json.dumps({"model": "m", "prompt": "so, and so, " * 2**18}).encode()
    assert parse_request(body).model == "m"


@pytest.mark.parametrize("colon", [":", " :"])
def test_a_body_of_very_many_keys_is_not_parsed(colon: str) -> None:
    keys = ",".join(f'"{number:x}"{colon}1' for number in range(1_990_000))
    with pytest.raises(HTTPError, match="250,000 keys"):
        parse_request(f'{{"model": "m", {keys}}}'.encode())


def test_a_text_of_many_colons_is_parsed() -> None:
    assert parse_request(json.dumps({"model": "m", "prompt": "at 12:30:01 " * 2**18}).encode()).model == "m"
