"""Adapters: how they are written, found at a source, known to control, asked for and routed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrun import LoRA, SpecError, Weights
from llmrun.errors import WeightsError
from llmrun.lora import as_lora, read_rank
from llmrun.spec import ModelSpec
from llmrun.wire import KeyInfo
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog as Catalogues
from llmrun_runtime.control.catalog.adapters import ModelAdapters
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.ingress.admission.admit import find_target
from llmrun_runtime.ingress.admission.auth import check_seen, may_see
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.routing import AFFINITY_SLACK, choose
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.adapters import Adapter, find_adapters
from llmrun_runtime.weights.pin import File, Pin
from llmrun_runtime.weights.stores.objects import ObjectStore
from llmrun_runtime.wire.headers import ADAPTER_HEADER
from llmrun_runtime.wire.routing_table import ReplicaRoute, Table, by_names
from tests.support.adapters import files, make_adapter
from tests.support.ingress import Bench, Engine, bearer, keys, route


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "say where adapters lie"),
        ({"path": "s3://a/b", "adapters": {"x": "s3://c"}}, "say where adapters lie"),
        ({"adapters": {"a:b": "s3://c"}}, "an adapter's name has letters"),
        ({"path": "s3://a/b", "max_loaded": 0}, "max_loaded=0: a number of adapters, 1 or more"),
        ({"path": "s3://a/b", "max_rank": 12}, "max_rank=12: one of 1, 8, 16"),
        ({"path": "s3://a/b", "refresh": 0}, "refresh=0: seconds, 1 or more"),
        ({"path": ""}, "name the weights"),
        ({"path": "s3://a/b", "canary": "yes"}, "canary='yes': True or False"),
    ],
)
def test_what_is_written_wrong_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        LoRA(**given)


def test_the_ways_of_writing_it_are_one() -> None:
    assert as_lora("s3://a/b") == LoRA("s3://a/b") == as_lora({"path": "s3://a/b"})
    found = as_lora({"legal": "acme/legal@v3", "sql": Weights("s3://acme/sql", anonymous=True)})
    assert found == LoRA(adapters={"legal": "acme/legal@v3", "sql": Weights("s3://acme/sql", anonymous=True)})
    assert LoRA.model_validate(found.model_dump(mode="json")) == found and as_lora(None) is None
    with pytest.raises(SpecError, match="lora=7: write a place"):
        as_lora(7)


def test_the_rank_is_that_of_the_adapters() -> None:
    lora = LoRA("s3://a/b")
    assert [lora.settled(ranks, None).max_rank for ranks in ([], [0], [8, 4], [24, 0], [999])] == [64, 64, 16, 32, 512]
    before = LoRA("s3://a/b", max_rank=128, max_loaded=2)
    assert lora.settled([24], before).max_rank == 128, "a deploy does not restart for less"
    assert lora.settled([200], before).max_rank == 256
    assert lora.settled([24], LoRA("s3://other", max_rank=128)).max_rank == 128, "nor for other places"
    assert LoRA("s3://a/b", max_rank=8).settled([24], before).max_rank == 8
    assert read_rank('{"r": 8, "rank_pattern": {"q_proj": 64, "v_proj": 4}}') == 64
    for config in (
        "[]",
        '{"r": 8, "rank_pattern": [64]}',
        "{}",
        '{"r": "x"}',
        '{"r": 1e999}',
        '{"r": 0}',
        "[" * 100_000,
        "no",
        b"\xff",
    ):
        with pytest.raises(ValueError):
            read_rank(config)


def test_adapters_are_found_folder_by_folder() -> None:
    both = ("adapter_config.json", "adapter_model.safetensors")
    names = [f"{folder}/{name}" for folder in ("one", "two") for name in both]
    more = [
        "one/adapter_model.bin",
        "one/README.md",
        "half/adapter_config.json",
        *(f"bad name/{name}" for name in both),
    ]
    listed = Pin(weights=Weights("s3://acme/all"), files=files(*names, *more))
    found = find_adapters(listed)
    assert found.keys() == {"one", "two"}
    pin = found["one"].pin
    assert pin.weights.source == "s3://acme/all/one" and [file.name for file in pin.files] == list(both)
    assert pin.id != found["two"].pin.id
    hub = find_adapters(Pin(weights=Weights("acme/all@v1"), revision="c" * 40, files=files(*names)))
    assert (hub["two"].folder, hub["two"].pin.revision) == ("two", "c" * 40)
    assert [file.name for file in hub["two"].pin.files] == [f"two/{name}" for name in both]
    alone = find_adapters(Pin(weights=Weights("acme/legal@v3"), revision="c" * 40, files=files(*both, "README.md")))
    assert alone.keys() == {"legal"} and alone["legal"].folder == ""


def test_a_folder_on_disk_is_a_source_of_adapters_too(tmp_path: Path) -> None:
    make_adapter(tmp_path / "one", seed=1)
    first = find_adapters(ObjectStore(Weights(str(tmp_path)), 1).listed())
    assert first.keys() == {"one"} and first["one"].pin.weights.path == str(tmp_path / "one")
    make_adapter(tmp_path / "one", seed=2)
    assert find_adapters(ObjectStore(Weights(str(tmp_path)), 1).listed())["one"].pin.id != first["one"].pin.id


def table(**more: Any) -> Table:
    """One model with adapters, one without."""
    facts: dict[str, Any] = {"lora": True, "adapters": {"legal": "pin-1", "sql": "pin-2"}} | more
    models = {"one": route(1, **facts), "two": route(2, name="two", names=("two",))}
    return Table("e", 1, models, by_names(models))


def test_names_of_adapters() -> None:
    found = find_target(table(), "org/one:legal")
    assert (found.model.name, found.name, found.adapter, found.pin) == ("one", "org/one", "legal", "pin-1")
    assert find_target(table(), "one").adapter == ""
    for name, status, said in (
        ("one:legl", 404, "one has no adapter 'legl': did you mean one:legal?"),
        ("one:xyz", 404, "it has 2, which GET /v1/models lists"),
        ("two:legal", 404, "two has no adapters"),
        ("three:legal", 404, "the model 'three:legal' does not exist"),
    ):
        with pytest.raises(HTTPError) as refused:
            find_target(table(), name)
        assert refused.value.status == status and said in refused.value.text
    with pytest.raises(HTTPError) as refused:
        find_target(table(adapters=None, adapters_trouble="access denied"), "one:legal")
    assert refused.value.status == 503 and "access denied" in refused.value.text and refused.value.retry_after


def test_a_wrong_name_among_ten_thousand_costs_milliseconds() -> None:
    many = table(adapters={f"customer-{number:05d}-legal": "pin" for number in range(10_000)})
    started = time.perf_counter()
    with pytest.raises(HTTPError, match="did you mean one:customer-01234-legal"):
        find_target(many, "one:customer-1234-legal")
    assert time.perf_counter() - started < 0.05


def test_replicas_that_have_the_adapter_come_first_while_they_are_not_overloaded() -> None:
    has = {"a": "", "b": "x", "c": "x"}
    replicas = tuple(ReplicaRoute(name, "h", 1, "t", frozenset(pins)) for name, pins in has.items())
    model = route(replicas=replicas, max_ongoing=100)

    def chosen(**flying: int) -> str:
        found = choose(model, flying, adapter="x")
        assert found
        return found.id

    assert chosen() == "b" and chosen(b=1) == "c"
    assert chosen(b=AFFINITY_SLACK + 1, c=AFFINITY_SLACK) == "c"
    assert chosen(b=AFFINITY_SLACK + 1, c=AFFINITY_SLACK + 1) == "a"


@pytest.mark.parametrize("models", [("org/one:legal",), ("one:legal", "two")])
def test_a_key_may_be_for_one_adapter(models: tuple[str, ...]) -> None:
    key, model = KeyInfo(name="few", models=models), table().models["one"]
    assert may_see(key, model, "legal") and not may_see(key, model, "sql") and not may_see(key, model)
    with pytest.raises(HTTPError) as refused:
        check_seen(key, model, "sql")
    assert refused.value.status == 403 and "not for one:sql: it is for" in refused.value.text
    with pytest.raises(HTTPError) as refused:
        find_target(table(), "one:sq", partial(may_see, key))
    assert "sql" not in refused.value.text and "it has 1," in refused.value.text
    whole = KeyInfo(name="all", models=("one",))
    assert may_see(whole, model) and may_see(whole, model, "sql")
    assert may_see(key, model, "legal@v3") and not may_see(key, model, "sql@v3")


async def test_models_are_listed_as_far_as_the_key_sees_them(bench: Bench) -> None:
    known = keys(KeyInfo(name="few", models=("one:legal",)))
    bench.table(route(1, lora=True, adapters={"legal": "pin-1", "sql": "pin-2"}), keys=known)
    async with bench.session.get(bench.url + "/v1/models", **bearer("few")) as answer:
        assert [model["id"] for model in (await answer.json())["data"]] == ["one:legal"]
    for name, status in (("one:legal", 200), ("one:sql", 403), ("one", 403)):
        async with bench.session.get(f"{bench.url}/v1/models/{name}", **bearer("few")) as answer:
            assert answer.status == status, name


LORA = LoRA("s3://acme/all", refresh=1)


class Source:
    """What a model's address has: adapters, or a reason why it cannot be asked. Stands for control's stock."""

    def __init__(self, *names: str) -> None:
        self.trouble = ""
        self.gate = asyncio.Event()
        """Answers are held back while it is not set."""
        self.gate.set()
        self.hold(*names)

    def hold(self, *names: str) -> None:
        """Have those and no others."""
        files = ("adapter_config.json", "adapter_model.safetensors")
        listed = tuple(File(name=f"{name}/{file}", size=1, version="1") for name in names for file in files)
        self.adapters_there = list(find_adapters(Pin(weights=Weights("s3://acme/all"), files=listed)).values())

    async def adapters(self, *_: Any) -> list[Adapter]:
        """They, or WeightsError."""
        await self.gate.wait()
        if self.trouble:
            raise WeightsError(self.trouble)
        return self.adapters_there


@contextlib.asynccontextmanager
async def catalogue(
    source: Source, database: Database, lora: LoRA = LORA
) -> AsyncIterator[tuple[Catalogues, dict[str, Any]]]:
    """Control's adapters of one model, looked at all the time; and what ingresses would be told."""
    told: dict[str, Any] = {}
    spec = ModelSpec(name="one", model="org/one", lora=lora)
    row = Deployed("app", 1, 1, spec, Placement(1, 0), proven=True)

    def tell(model: str, found: dict[str, str] | None, trouble: str = "") -> None:
        told[model] = (found, trouble)

    scaling: Any = SimpleNamespace(deployed={"one": row}, set_adapters=tell)
    stock: Any = source
    made = Catalogues(scaling, stock, database)
    made.load()
    running = asyncio.create_task(made.run())
    try:
        yield made, told
    finally:
        running.cancel()
        await asyncio.gather(running, *made._looking.values(), return_exceptions=True)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_listing_that_fails_or_is_empty_removes_nothing_and_control_may_restart(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    source = Source("legal", "sql")
    async with catalogue(source, database) as (made, told):
        await eventually(lambda: "one" in told)
        known = told["one"]
        assert known[0].keys() == {"legal", "sql"} and made.has("one", "sql") and not made.has("one", "law")
        for source.trouble, names in (("away", ["legal", "sql"]), ("", [])):
            source.hold(*names)
            before = made._known["one"].looked
            await eventually(lambda before=before: made._known["one"].looked > before)  # type: ignore[misc]
            assert told["one"] == known
    source.trouble = "away"
    async with catalogue(source, database) as (made, told):
        assert told["one"] == known
        assert made.find("one", "sql", known[0]["sql"]).name == "sql"
        source.trouble = ""
        source.hold("legal", "law")
        await eventually(lambda: told["one"][0].keys() == {"legal", "law"})
        assert made.find("one", "sql", known[0]["sql"]).name == "sql", "for requests that were let in before"
    database.remove(["one"])
    async with catalogue(Source("new"), database) as (_, told):
        assert told == {}
    database.close()


async def test_a_redeploy_while_the_address_is_empty_removes_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    source = Source("legal", "sql")
    async with catalogue(source, database) as (made, told):
        await eventually(lambda: "one" in told)
        source.hold()
        spec = ModelSpec(name="one", model="org/one", lora=LORA, max_replicas=2)
        await made.settle(spec, Placement(1, 0), ask=True)
        made.tell("one")
        assert told["one"][0].keys() == {"legal", "sql"}
    database.close()


async def test_one_source_that_is_away_holds_up_no_other(tmp_path: Path) -> None:
    class Each:
        """A folder of one adapter for each source."""

        def __init__(self) -> None:
            self.away: set[str] = set()
            self.version = "1"

        async def adapters(self, weights: Weights, *_: Any) -> list[Adapter]:
            if weights.source in self.away:
                raise WeightsError(f"{weights.source} is away")
            names = ("adapter_config.json", "adapter_model.safetensors")
            listed = tuple(File(name=name, size=1, version=self.version) for name in names)
            return list(find_adapters(Pin(weights=weights, files=listed)).values())

    database, each = Database(f"sqlite:///{tmp_path}/control.db"), Each()
    named = LoRA(adapters={"a": "s3://acme/a", "b": "s3://acme/b"}, refresh=1)
    async with catalogue(each, database, named) as (made, told):  # type: ignore[arg-type]
        await eventually(lambda: "one" in told)
        before = told["one"][0]
        each.away, each.version = {"s3://acme/a"}, "2"
        await eventually(lambda: told["one"][0]["b"] != before["b"])
        assert told["one"][0]["a"] == before["a"]
        with pytest.raises(WeightsError, match="s3://acme/a is away"):
            await made.settle(ModelSpec(name="one", model="org/one", lora=named), Placement(1, 0), ask=True)
    database.close()


async def test_the_engine_hears_which_adapter_was_admitted(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, lora=True, adapters={"legal": "pin-1"}))
    assert (await bench.ask({"model": "one:legal"}, headers={ADAPTER_HEADER: "other pin-9"}))[0] == 200
    assert (await bench.ask(headers={ADAPTER_HEADER: "other pin-9"}))[0] == 200
    adapted, plain = engine.asked
    assert adapted.headers.getlist(ADAPTER_HEADER) == ["legal pin-1"] and ADAPTER_HEADER not in plain.headers
    async with bench.session.get(bench.url + "/v1/models/one:legal") as answer:
        listed = await answer.json()
    assert (listed["id"], listed["parent"]) == ("one:legal", "one")


async def test_ten_thousand_adapters_are_listed_while_others_have_their_turn(bench: Bench) -> None:
    many = {f"customer-{number:05d}": f"pin-{number}" for number in range(10_000)}
    bench.table(route(1, lora=True, adapters=many))
    pauses, ended = [], False

    async def tick() -> None:
        while not ended:
            began = time.perf_counter()
            await asyncio.sleep(0)
            pauses.append(time.perf_counter() - began)

    ticking = asyncio.create_task(tick())
    async with bench.session.get(bench.url + "/v1/models") as answer:
        raw = await answer.read()
    ended = True
    await ticking
    listed = json.loads(raw)["data"]
    assert len(listed) == 10_001 and listed[1]["id"] == "one:customer-00000" and listed[1]["parent"] == "one"
    assert sorted(pauses)[-5] < 0.02, "the loop is never held for long (rare pauses are the machine's)"


async def test_only_the_revision_that_lora_names_may_be_asked_for(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    pin = Pin(weights=Weights("acme/legal@v3"), revision="c" * 40, files=files("adapter_config.json"))
    source = Source()
    source.adapters_there = [Adapter(name="legal", pin=pin)]
    lora = LoRA(adapters={"legal": "acme/legal@v3", "free": "acme/free"})
    async with catalogue(source, database, lora) as (made, told):
        await eventually(lambda: bool(told.get("one", [None])[0]))
        assert (await made.revision("one", "free@v1")).pin == (await made.revision("one", "legal@v3")).pin == pin.id
        other = await made.revision("one", "legal@v2")
        assert other.missing and "names the revision v3 of acme/legal, and no other" in other.trouble
    database.close()


async def test_a_redeploy_with_other_sources_tells_what_its_plan_heard(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    source = Source("legal")
    async with catalogue(source, database) as (made, told):
        await eventually(lambda: "one" in told)
        source.hold("sql")
        source.gate.clear()  # a listing of the old sources is under way ...
        await eventually(lambda: bool(made._looking))
        late = made._looking["one"]
        row = made._scaling.deployed["one"]
        lora = LoRA("s3://acme/more", refresh=60)
        spec = row.spec.model_copy(update={"lora": lora})
        made._planned["one"] = ModelAdapters(lora, {a.name: a for a in Source("law").adapters_there}, looked=1e9)
        made._scaling.deployed["one"] = replace(row, spec=spec)
        made.tell("one")
        assert told["one"][0].keys() == {"law"}
        source.gate.set()
        assert not await late, "... and changes nothing any more"
        assert told["one"][0].keys() == {"law"}
    database.close()


def test_a_new_commit_has_the_ranks_that_are_known() -> None:
    def at(commit: str, config: str) -> Adapter:
        files = (File(name="a/adapter_config.json", size=1, digests={"git": config}),)
        return Adapter(name="a", pin=Pin(weights=Weights("org/a"), revision=commit, files=files))

    assert at("1" * 40, "x").config_id == at("2" * 40, "x").config_id != at("2" * 40, "y").config_id
    assert at("1" * 40, "x").pin.id != at("2" * 40, "x").pin.id
