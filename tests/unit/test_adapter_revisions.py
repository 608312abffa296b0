"""Adapters at revisions that requests name: `model:adapter@revision`."""

from __future__ import annotations

import asyncio

import pytest

from llmrun import Weights
from llmrun.errors import NotFound, WeightsError
from llmrun.wire import KeyInfo
from llmrun_runtime.control.catalog import adapter_revisions
from llmrun_runtime.control.catalog.adapter_revisions import AdapterRevisions
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.headers import ADAPTER_HEADER
from llmrun_runtime.wire.reports import AdapterRevision
from tests.support.adapters import files
from tests.support.ingress import Bench, Engine, bearer, keys, route, running_ingress


async def test_a_revision_is_resolved_by_control_and_not_listed(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, lora=True, adapters={"legal": "pin-1", "legal@v2": "pin-2"}))
    bench.revisions |= {
        "legal@v1": AdapterRevision("pin-0"),
        "legal@v9": AdapterRevision(error="acme/legal has no revision 'v9'", missing=True),
        "legal@late": AdapterRevision(error="the Hub is not reachable"),
    }
    for name, status, message in (
        ("one:legal@v1", 200, ""),
        ("one:legal@v2", 200, ""),
        ("one:legal@v9", 404, "model 'one:legal@v9' not found: acme/legal has no revision"),
        ("one:legal@late", 503, "cannot resolve one:legal@late: the Hub is not reachable"),
        ("one:lega@v1", 404, "Did you mean one:legal?"),
    ):
        actual, headers, answer = await bench.post({"model": name})
        assert actual == status and message in str(answer) and ("Retry-After" in headers) == (status == 503)
    assert [request.headers[ADAPTER_HEADER] for request in engine.requests] == ["legal@v1 pin-0", "legal@v2 pin-2"]
    async with bench.session.get(bench.url + "/v1/models") as answer:
        listed = [model["id"] for model in (await answer.json())["data"]]
        assert listed == ["one", "org/one", "one:legal", "org/one:legal"]
    async with bench.session.get(bench.url + "/v1/models/one:legal@v9") as answer:
        assert answer.status == 404


async def test_a_commit_is_resolved_once_and_a_branch_again() -> None:
    resolved: list[str] = []
    errors: list[WeightsError] = []
    pin = Pin(weights=Weights("acme/legal@x"), revision="c" * 40, files=files("adapter_config.json"))

    async def resolve(model: str, name: str, revision: str) -> Adapter:
        resolved.append(revision)
        await asyncio.sleep(0)
        if errors:
            raise errors[0]
        return Adapter(name=name, pin=pin)

    revisions = AdapterRevisions(resolve)
    commit, branch = f"legal@{'c' * 40}", "legal@main"
    replies = await asyncio.gather(*(revisions.find("one", name, 0) for name in (commit, branch) * 5))
    assert {reply.pin for reply in replies} == {pin.id} and len(resolved) == 2
    await revisions.find("one", commit, 0)
    assert len(resolved) == 2
    assert revisions.pins("one", 60).keys() == {commit, branch} and not revisions.pins("two", 60)
    await revisions.find("one", branch, 0)
    assert resolved[2:] == ["main"] and revisions.pins("one", 0).keys() == {commit}
    errors.append(WeightsError("unavailable"))
    assert (await revisions.find("one", branch, 0)).pin == pin.id, "the last resolution stays valid"
    unavailable = await revisions.find("one", "legal@v8", 60)
    assert (unavailable.pin, unavailable.error, unavailable.missing) == ("", "unavailable", False)
    errors[:] = [NotFound("removed")]
    assert (await revisions.find("one", branch, 0)).missing
    assert (await revisions.find("one", "legal@v 8", 60)).missing and resolved[-1] == "main"
    before = len(resolved)
    assert (await revisions.find("one", branch, 0)).missing and len(resolved) == before, "not resolved again at once"


async def test_an_unresponsive_source_does_not_block_cached_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_revisions, "WAIT_LIMIT_S", 0.05)
    pins = [Pin(weights=Weights("org/a"), revision=letter * 40, files=()) for letter in "ab"]
    hang = asyncio.Event()

    async def resolve(model: str, name: str, revision: str) -> Adapter:
        if len(pins) == 1:
            await hang.wait()
        return Adapter(name=name, pin=pins.pop(0))

    revisions = AdapterRevisions(resolve)
    first = (await revisions.find("one", "legal@main", 0)).pin
    async with asyncio.timeout(2):
        assert (await revisions.find("one", "legal@main", 0)).pin == first
        assert (await revisions.find("one", "legal@main", 0)).pin == first
    hang.set()
    await asyncio.sleep(0.05)
    assert (await revisions.find("one", "legal@main", 60)).pin != first, "the pending call has completed"


async def test_the_number_of_revisions_is_limited() -> None:
    pins = iter(Pin(weights=Weights("org/a"), revision=letter * 40, files=()) for letter in "abc")
    hold, started = asyncio.Event(), asyncio.Event()

    async def resolve(model: str, name: str, revision: str) -> Adapter:
        if revision.startswith("v"):
            started.set()
            await hold.wait()
            raise NotFound("removed")
        return Adapter(name=name, pin=next(pins))

    revisions = AdapterRevisions(resolve)
    for invalid in ("refs/pr/1", "a/../b", "..", "", "x" * 201):
        assert (await revisions.find("one", f"legal@{invalid}", 60)).missing
    moved = [(await revisions.find("one", "legal@main", 0)).pin for _ in range(2)]
    assert [adapter.pin.id for adapter in revisions.adapters("one", "legal@main")] == moved[::-1]
    waiting = [asyncio.ensure_future(revisions.find("one", f"legal@v{n}", 60)) for n in range(100)]
    await asyncio.sleep(0)
    hold.set()
    missing = [(await reply).missing for reply in waiting]
    assert missing == [True] * 64 + [False] * 36
    assert revisions.pins("one", 60).keys() == {"legal@main"}, "missing revisions evict nothing"
    hold.clear()
    started.clear()
    late = asyncio.ensure_future(revisions.find("one", "legal@v1000", 60))
    await started.wait()
    revisions.forget("one")
    hold.set()
    assert "one was redeployed" in (await late).error, "a reply of the old sources is not kept"
    assert not revisions.adapters("one", "legal@main")
    await revisions.find("one", "legal@main", 0)
    revisions.keep("one", {"other"})
    assert not revisions.adapters("one", "legal@main")


async def test_limits_and_deadlines_apply_while_control_resolves(engine: Engine) -> None:
    async with running_ingress(request_timeout=1) as bench:
        few = keys(KeyInfo(name="few", max_in_flight=1))
        bench.table(route(engine.port, lora=True, adapters={"legal": "pin-1"}), keys=few)
        bench.revisions["legal@v1"] = AdapterRevision("pin-0")
        bench.control.clear()
        late = asyncio.create_task(bench.post({"model": "one:legal@v1"}, **bearer("few")))
        while not bench.limiter.usage(0):
            await asyncio.sleep(0.01)
        status, _, answer = await bench.post({"model": "one:legal@v1"}, **bearer("few"))
        assert status == 429 and "(max_in_flight)" in answer["error"]["message"]
        status, _, answer = await late
        assert status == 504 and "LLMRUN_REQUEST_TIMEOUT" in answer["error"]["message"]
        cancelled = asyncio.create_task(bench.post({"model": "one:legal@v1"}, **bearer("few")))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        bench.control.set()
        async with asyncio.timeout(5):
            while (await bench.post({"model": "one:legal@v1"}, **bearer("few")))[0] != 200:
                await asyncio.sleep(0.02)
        assert len(engine.requests) == 1, "the cancelled request was not sent"
