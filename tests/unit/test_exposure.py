"""What strangers, web pages and restricted keys learn from the ingress: nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from llmrun.errors import Refused
from llmrun.identity import digest_of
from llmrun.wire import KeyInfo
from llmrun_runtime.asgi import Scope
from llmrun_runtime.control.keys import HAD_KEY, Keys
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.tables import MetaRow
from llmrun_runtime.ingress.admission.browser import check_browser, check_content_type, names
from llmrun_runtime.ingress.endpoints.metrics import IngressMetrics
from llmrun_runtime.ingress.errors import HTTPError
from tests.support.ingress import CHAT, Bench, Engine, bearer, keys, route, running_ingress


@pytest.fixture
async def closed() -> AsyncIterator[Bench]:
    """An ingress beyond this machine, with a token for metrics."""
    async with running_ingress(keys_only=True, metrics_token="scrape") as bench:
        yield bench


async def get(bench: Bench, path: str, **headers: str) -> tuple[int, str]:
    async with bench.session.get(bench.url + path, headers=headers) as response:
        return response.status, await response.text()


async def test_metrics_beyond_this_machine_need_a_token_or_the_admin_key(closed: Bench, engine: Engine) -> None:
    closed.table(route(engine.port), admin=digest_of("root"), keys=keys(KeyInfo(name="alice")))
    for value in ("", "Bearer ", "Bearer wrong", "Bearer alice", "Basic scrape"):
        status, text = await get(closed, "/metrics", **({"authorization": value} if value else {}))
        assert status == 401 and "invalid_metrics_token" in text
    for value in ("Bearer scrape", "bearer root"):
        assert (await get(closed, "/metrics", authorization=value))[0] == 200


async def test_metrics_on_this_machine_are_for_prometheus_without_configuration(bench: Bench) -> None:
    assert (await get(bench, "/metrics"))[0] == 200
    assert (await get(bench, "/metrics", host="evil.example"))[0] == 403


async def test_many_scrapes_ask_the_engines_only_now_and_then(
    bench: Bench, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.table(route(engine.port))
    asked: list[int] = []
    gather = IngressMetrics.gather

    async def counted(*args: Any) -> bytes:
        asked.append(1)
        return await gather(*args)

    monkeypatch.setattr(IngressMetrics, "gather", counted)
    for _ in range(20):
        assert (await get(bench, "/metrics"))[0] == 200
    assert len(asked) <= 2


def scope(method: str = "POST", **headers: str) -> Scope:
    return {"method": method, "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "a.localhost"]
)
def test_local_hosts_are_allowed(host: str) -> None:
    check_browser(scope(host=host), (), ())


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"]
)
def test_a_name_that_a_page_may_have_rebound_is_refused(host: str) -> None:
    for method in ("GET", "POST"):
        with pytest.raises(HTTPError) as refused:
            check_browser(scope(method, host=host), (), ())
        assert (refused.value.status, refused.value.code) == (403, "host_not_allowed")
        check_browser(scope(method, host=host), names(f"other, {host.partition(':')[0].upper()}"), ())


def test_a_post_from_another_sites_page_is_refused() -> None:
    for origin in ("https://evil.example", "null", "http://localhost:3000"):
        with pytest.raises(HTTPError) as refused:
            check_browser(scope(host="localhost:8000", origin=origin), (), names("https://chat.example"))
        assert (refused.value.status, refused.value.code) == (403, "origin_not_allowed")
        check_browser(scope(host="localhost:8000", origin=origin), (), names("*"))
        check_browser(scope("GET", host="localhost:8000", origin=origin), (), ())
    check_browser(scope(host="localhost:8000", origin="http://localhost:8000"), (), ())
    check_browser(scope(host="localhost:8000", origin="https://chat.example"), (), names("https://chat.example/"))


async def test_a_page_cannot_wake_a_model(bench: Bench) -> None:
    """A browser sends text, forms and blobs to any site without asking it."""
    bench.table(route(state="cold"))
    body = {"model": "one"}
    status, _, answer = await bench.post(body, headers={"origin": "https://evil.example"})
    assert (status, answer["error"]["code"]) == (403, "origin_not_allowed")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "text/plain; a=application/json"):
        status, _, answer = await bench.post(body, headers={"content-type": kind})
        assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
    assert bench.queue.traffic() == {}
    with pytest.raises(HTTPError):
        check_content_type(scope())
    for kind in (
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/vnd.api+json",
        "multipart/form-data; b",
    ):
        check_content_type(scope(content_type=kind))


async def test_pages_may_call_v1_alone() -> None:
    async with running_ingress(cors_origins="https://chat.example") as bench:
        bench.table(route(state="cold"))
        origin = {"origin": "https://chat.example"}
        async with bench.session.get(f"{bench.url}/v1/models", headers=origin) as response:
            assert response.headers["access-control-allow-origin"] == "https://chat.example"
        status, headers, _ = await bench.post({"model": "none"}, headers=origin)
        assert status == 404 and headers["access-control-allow-origin"] == "https://chat.example"
        for path in ("/metrics", "/health", "/llmrun/v1/status"):
            async with bench.session.get(bench.url + path, headers=origin) as response:
                assert "access-control-allow-origin" not in response.headers


async def test_only_the_operator_sees_why_a_model_does_not_start(bench: Bench) -> None:
    cause = "/srv/secret/weights: access denied (on node 10.0.0.5)"
    models = (route(state="failed", cause=cause, failures=3, paused=True),)
    bench.table(*models)
    _, _, answer = await bench.post()
    assert cause in answer["error"]["message"], "without keys, whoever can connect is the operator"
    bench.table(*models, keys=keys(KeyInfo(name="alice")), admin=digest_of("root"))
    status, headers, answer = await bench.post(**bearer("alice"))
    assert status == 503 and answer["error"]["code"] == "model_failed"
    assert (
        answer["error"]["message"] == f"one failed to start: see request {headers['x-request-id']} in the ingress log"
    )
    _, _, answer = await bench.post(**bearer("root"))
    assert cause in answer["error"]["message"]
    lora = replace(route(1), lora=True, adapters=None, adapters_error=cause)
    bench.table(lora, keys=keys(KeyInfo(name="alice")))
    _, _, answer = await bench.post({"model": "one:a"}, **bearer("alice"))
    assert "10.0.0.5" not in answer["error"]["message"] and answer["error"]["code"] == "adapters_unknown"


async def test_request_ids_cannot_forge_lines_of_the_log(bench: Bench) -> None:
    for given in ("abc key admin model /v1/x 200", "a;b", "a" * 129):
        async with bench.session.post(bench.url + CHAT, headers={"x-request-id": given}) as response:
            assert response.headers["x-request-id"] != given
    async with bench.session.post(bench.url + CHAT, headers={"x-request-id": "req_1-a.b"}) as response:
        assert response.headers["x-request-id"] == "req_1-a.b"


def test_an_endpoint_that_had_a_key_stays_closed(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")

    def loaded(required: bool | None = None) -> Keys:
        again = Keys(database, required)
        again.load()
        return again

    first = loaded()
    assert not first.required and loaded(required=True).required
    first.create(KeyInfo(name="alice"))
    assert first.required and loaded().required and not loaded(required=False).required
    with database.session() as session, session.begin():  # a key of an earlier release
        session.execute(delete(MetaRow).where(MetaRow.key == HAD_KEY))
    first = loaded()
    first.revoke("alice")
    assert first.required and loaded().required and not loaded(required=False).required
    with pytest.raises(Refused, match="the admin key has this name"):
        first.create(KeyInfo(name="admin"))


async def test_a_table_can_require_keys(bench: Bench) -> None:
    bench.table(route(state="cold"), keys_required=True)
    status, _, answer = await bench.post()
    assert (status, answer["error"]["code"]) == (401, "missing_api_key")
    async with bench.session.get(f"{bench.url}/v1/models") as response:
        assert response.status == 401
