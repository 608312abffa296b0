"""Caps on what one request may generate, and tokens reserved for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmrun.wire import KeyInfo
from llmrun_runtime.ingress.admission.output_tokens import OutputCap, Wanted, with_field
from llmrun_runtime.ingress.admission.rate_limits import Limit, Limiter
from llmrun_runtime.ingress.admission.request import parse_request
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.wire.reports import RemoteUsage
from tests.support.ingress import Bench, Engine, bearer, keys, route

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CAP = OutputCap(100, "key a")


@pytest.mark.parametrize(
    ("path", "body", "field", "value"),
    [
        (CHAT, {}, "max_tokens", 100),
        (CHAT, {"max_tokens": None}, "max_tokens", 100),
        (CHAT, {"max_completion_tokens": 7}, "max_tokens", 7),  # engines that ignore the newer name, too
        (CHAT, {"n": 4}, "max_tokens", 25),
        (CHAT, {"n": 4, "max_tokens": 25}, "max_tokens", 25),
        (TEXT, {"prompt": ["a", "b"], "best_of": 5}, "max_tokens", 10),
        (TEXT, {"prompt": [1, 2, 3], "max_tokens": "100"}, "max_tokens", 100),
        (TEXT, {"prompt": [[1], [2]]}, "max_tokens", 50),
        (TEXT, {"prompt_embeds": ["a", "b", "c", "d"]}, "max_tokens", 25),
        ("/v1/responses", {}, "max_output_tokens", 100),
        ("/v1/messages", {"max_tokens": 3}, "max_tokens", 3),
    ],
)
def test_a_cap_is_what_a_request_may_generate_in_all(path: str, body: dict[str, Any], field: str, value: int) -> None:
    assert CAP.apply(path, Wanted.of(body)) == (field, value)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"max_tokens": 101}, "101 tokens for each of 1 choices. Lower 'max_tokens' or 'n'"),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": 101}, "101 tokens"),
        (CHAT, {"n": 3, "max_tokens": 34}, "34 tokens for each of 3"),
        (CHAT, {"n": 101}, "asks for 101 choices"),
        (TEXT, {"prompt": ["x"] * 51, "n": 2, "max_tokens": 1}, "1 tokens for each of 102"),
        (TEXT, {"max_tokens": 1e300}, "key a allows 100 tokens"),
        ("/v1/responses", {"max_output_tokens": 101}, "Lower 'max_output_tokens'"),
        ("/generate", {}, "/generate with this body has no limit of its output, which key a requires"),
    ],
)
def test_a_request_that_wants_more_is_refused(path: str, body: dict[str, Any], words: str) -> None:
    with pytest.raises(HTTPError) as caught:
        CAP.apply(path, Wanted.of(body))
    assert caught.value.status == 400 and words in caught.value.message


def test_paths_without_output_are_not_capped() -> None:
    assert CAP.apply("/v1/embeddings", Wanted.of({})) is None
    assert CAP.apply("/v1/audio/transcriptions", Wanted()) is None
    with pytest.raises(HTTPError, match="no limit of its output"):
        CAP.apply(CHAT, Wanted())  # a form


@pytest.mark.parametrize("body", [b'{"a": {}} \n', b'{"max_tokens": null}', '{"a": "ü"}'.encode("utf-16")])
def test_the_cap_is_the_last_field_of_that_name(body: bytes) -> None:
    assert json.loads(with_field(body, "max_tokens", 5)) == json.loads(body) | {"max_tokens": 5}


def test_the_tokens_of_requests_in_flight_are_reserved() -> None:
    limiter, limit = Limiter(), [Limit("key:a", "key a", tpm=100)]
    with limiter.reserve(limit, 1000.0, 60):
        with pytest.raises(HTTPError, match=r"100 tokens per minute \(tpm\), 0 used, 101 more if this request") as full:
            limiter.reserve(limit, 1000.0, 41).__enter__()
        assert full.value.status == 429
        with limiter.reserve(limit, 1000.0, 40):
            assert limiter.usage(1000.0)["key:a"].reserved == 100
    assert not limiter.usage(1000.0)  # also after an error
    limiter.set_remote({"key:a": RemoteUsage(tokens=30, reserved=50)}, 1000.0)
    with pytest.raises(HTTPError, match="30 used, 80 more"):
        limiter.reserve(limit, 1000.0, 30).__enter__()
    with limiter.reserve(limit, 1000.0, 20):
        pass


def test_a_request_states_what_it_wants() -> None:
    wanted = parse_request(b'{"model": "m", "n": 2, "max_tokens": 9}').wanted
    assert wanted.total(CHAT) == 18 and wanted.total("/v1/responses") == 0


async def test_an_engine_gets_the_smaller_cap_of_key_and_model(bench: Bench, engine: Engine) -> None:
    all_keys = keys(KeyInfo(name="small", max_output_tokens=50), KeyInfo(name="free"))
    bench.table(route(engine.port, max_output_tokens=80), keys=all_keys)
    for key, expected in (("small", 50), ("free", 80)):
        status, _, _ = await bench.post({"model": "one"}, **bearer(key))
        assert status == 200 and engine.body["max_tokens"] == expected
    status, _, answer = await bench.post({"model": "one", "max_tokens": 51}, **bearer("small"))
    assert status == 400 and answer["error"]["code"] == "output_too_long"
    assert answer["error"]["param"] == "max_tokens"
