"""Adapters at revisions that callers name: `model:adapter@revision`."""

from __future__ import annotations

import asyncio

import pytest

from llmrun import Weights
from llmrun.errors import NotFound, WeightsError
from llmrun.wire import KeyInfo
from llmrun_runtime.control.catalog import adapter_revisions as control
from llmrun_runtime.control.catalog.adapter_revisions import AdapterRevisions
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.headers import ADAPTER_HEADER
from llmrun_runtime.wire.reports import AdapterRevision
from tests.support.adapters import files
from tests.support.ingress import Bench, Engine, an_ingress, bearer, keys, route


async def test_a_revision_is_asked_of_control_and_is_not_listed(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, lora=True, adapters={"legal": "pin-1", "legal@v2": "pin-2"}))
    bench.revisions |= {
        "legal@v1": AdapterRevision("pin-0"),
        "legal@v9": AdapterRevision(trouble="acme/legal has no revision 'v9'", missing=True),
        "legal@away": AdapterRevision(trouble="the Hub cannot be asked"),
    }
    for name, status, said in (
        ("one:legal@v1", 200, ""),
        ("one:legal@v2", 200, ""),
        ("one:legal@v9", 404, "the model 'one:legal@v9' does not exist: acme/legal has no revision"),
        ("one:legal@away", 503, "what one:legal@away means is not known: the Hub cannot be asked"),
        ("one:lega@v1", 404, "did you mean one:legal?"),
    ):
        found, headers, answer = await bench.ask({"model": name})
        assert found == status and said in str(answer) and ("Retry-After" in headers) == (status == 503)
    assert [asked.headers[ADAPTER_HEADER] for asked in engine.asked] == ["legal@v1 pin-0", "legal@v2 pin-2"]
    async with bench.session.get(bench.url + "/v1/models") as answer:
        assert [model["id"] for model in (await answer.json())["data"]] == ["one", "one:legal"]
    async with bench.session.get(bench.url + "/v1/models/one:legal@v9") as answer:
        assert answer.status == 404


async def test_a_commit_is_asked_for_once_and_a_branch_again() -> None:
    asked: list[str] = []
    trouble: list[WeightsError] = []
    pin = Pin(weights=Weights("acme/legal@x"), revision="c" * 40, files=files("adapter_config.json"))

    async def ask(model: str, name: str, revision: str) -> Adapter:
        asked.append(revision)
        await asyncio.sleep(0)
        if trouble:
            raise trouble[0]
        return Adapter(name=name, pin=pin)

    revisions = AdapterRevisions(ask)
    commit, branch = f"legal@{'c' * 40}", "legal@main"
    found = await asyncio.gather(*(revisions.find("one", called, 0) for called in (commit, branch) * 5))
    assert {said.pin for said in found} == {pin.id} and len(asked) == 2
    await revisions.find("one", commit, 0)
    assert len(asked) == 2 and revisions.pins("one", 60).keys() == {commit, branch} and not revisions.pins("two", 60)
    await revisions.find("one", branch, 0)
    assert asked[2:] == ["main"] and revisions.pins("one", 0).keys() == {commit}
    trouble.append(WeightsError("away"))
    assert (await revisions.find("one", branch, 0)).pin == pin.id, "it goes on to mean what it did"
    away = await revisions.find("one", "legal@v8", 60)
    assert (away.pin, away.trouble, away.missing) == ("", "away", False)
    trouble[:] = [NotFound("gone")]
    assert (await revisions.find("one", branch, 0)).missing
    assert (await revisions.find("one", "legal@v 8", 60)).missing and asked[-1] == "main"
    before = len(asked)
    assert (await revisions.find("one", branch, 0)).missing and len(asked) == before, "a wrong one is not asked again"


async def test_a_source_that_hangs_does_not_hold_up_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "PATIENCE_S", 0.05)
    pins = [Pin(weights=Weights("org/a"), revision=letter * 40, files=()) for letter in "ab"]
    hang = asyncio.Event()

    async def ask(model: str, name: str, revision: str) -> Adapter:
        if len(pins) == 1:
            await hang.wait()
        return Adapter(name=name, pin=pins.pop(0))

    revisions = AdapterRevisions(ask)
    first = (await revisions.find("one", "legal@main", 0)).pin
    async with asyncio.timeout(2):
        assert (await revisions.find("one", "legal@main", 0)).pin == first
        assert (await revisions.find("one", "legal@main", 0)).pin == first
    hang.set()
    await asyncio.sleep(0.05)
    assert (await revisions.find("one", "legal@main", 60)).pin != first, "the question that hung was answered after all"


async def test_what_callers_name_is_bounded() -> None:
    pins = iter(Pin(weights=Weights("org/a"), revision=letter * 40, files=()) for letter in "abc")
    hold, begun = asyncio.Event(), asyncio.Event()

    async def ask(model: str, name: str, revision: str) -> Adapter:
        if revision.startswith("v"):
            begun.set()
            await hold.wait()
            raise NotFound("gone")
        return Adapter(name=name, pin=next(pins))

    revisions = AdapterRevisions(ask)
    for wrong in ("refs/pr/1", "a/../b", "..", "", "x" * 201):
        assert (await revisions.find("one", f"legal@{wrong}", 60)).missing
    moved = [(await revisions.find("one", "legal@main", 0)).pin for _ in range(2)]
    assert [adapter.pin.id for adapter in revisions.adapters("one", "legal@main")] == moved[::-1]
    waiting = [asyncio.ensure_future(revisions.find("one", f"legal@v{n}", 60)) for n in range(100)]
    await asyncio.sleep(0)
    hold.set()
    said = [(await one).missing for one in waiting]
    assert said == [True] * 64 + [False] * 36
    assert revisions.pins("one", 60).keys() == {"legal@main"}, "wrong ones push nothing out"
    hold.clear()
    begun.clear()
    entry = asyncio.ensure_future(revisions.find("one", "legal@v1000", 60))
    await begun.wait()
    revisions.forget("one")
    hold.set()
    assert "has been deployed anew" in (await entry).trouble, "what was asked of other sources is not kept"
    assert not revisions.adapters("one", "legal@main")
    await revisions.find("one", "legal@main", 0)
    revisions.keep("one", {"other"})
    assert not revisions.adapters("one", "legal@main")


async def test_limits_and_deadlines_hold_while_control_is_asked(engine: Engine) -> None:
    async with an_ingress(request_timeout=1) as bench:
        known = keys(KeyInfo(name="few", max_in_flight=1))
        bench.table(route(engine.port, lora=True, adapters={"legal": "pin-1"}), keys=known)
        bench.revisions["legal@v1"] = AdapterRevision("pin-0")
        bench.control.clear()
        late = asyncio.create_task(bench.ask({"model": "one:legal@v1"}, **bearer("few")))
        while not bench.limiter.spent(0):
            await asyncio.sleep(0.01)
        status, _, answer = await bench.ask({"model": "one:legal@v1"}, **bearer("few"))
        assert status == 429 and "(max_in_flight)" in answer["error"]["message"]
        status, _, answer = await late
        assert status == 504 and "LLMRUN_REQUEST_TIMEOUT" in answer["error"]["message"]
        gone = asyncio.create_task(bench.ask({"model": "one:legal@v1"}, **bearer("few")))
        await asyncio.sleep(0.1)
        gone.cancel()
        bench.control.set()
        async with asyncio.timeout(5):
            while (await bench.ask({"model": "one:legal@v1"}, **bearer("few")))[0] != 200:
                await asyncio.sleep(0.02)
        assert len(engine.asked) == 1, "who left was not asked for"
