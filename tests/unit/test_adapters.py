"""Adapters: their definition, discovery at a source, control's catalog, names in requests, and routing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from llmrun import LoRA, SpecError, Weights
from llmrun.errors import Refused, WeightsError
from llmrun.lora import as_lora, read_lora_rank
from llmrun.wire import KeyInfo
from llmrun_runtime.control.catalog.adapter_sources import ModelAdapters
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Models
from llmrun_runtime.control.state.tables import AdaptersRow
from llmrun_runtime.ingress.admission.auth import can_access
from llmrun_runtime.ingress.admission.target import find_target
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.routing import AFFINITY_SLACK, choose
from llmrun_runtime.weights.adapters import Adapter, AdapterListing, find_adapters, find_skipped
from llmrun_runtime.weights.pin import File, Pin
from llmrun_runtime.weights.stores.objects import ObjectStore
from llmrun_runtime.wire.headers import ADAPTER_HEADER
from llmrun_runtime.wire.routing_table import ReplicaRoute, Table, by_names
from tests.support.adapters import files, make_adapter
from tests.support.factories import CPU, deployed, spec
from tests.support.ingress import Bench, Engine, bearer, keys, route


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one place or a mapping of adapters is required"),
        ({"path": "s3://a/b", "adapters": {"x": "s3://c"}}, "exactly one place or a mapping of adapters is required"),
        ({"adapters": {"a:b": "s3://c"}}, "an adapter's name may contain only letters"),
        ({"path": "s3://a/b", "max_loaded": 0}, "max_loaded=0: must be a number of adapters, 1 or more"),
        ({"path": "s3://a/b", "max_rank": 12}, "max_rank=12: must be one of 1, 8, 16"),
        ({"path": "s3://a/b", "refresh": 0}, "refresh=0: must be seconds, 1 or more"),
        ({"path": ""}, "must be a source of weights"),
        ({"path": "s3://a/b", "canary": "yes"}, "canary='yes': must be True or False"),
    ],
)
def test_an_invalid_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LoRA(**arguments)


def test_all_ways_of_writing_lora_are_equivalent() -> None:
    assert as_lora("s3://a/b") == LoRA("s3://a/b") == as_lora({"path": "s3://a/b"})
    lora = as_lora({"legal": "acme/legal@v3", "sql": Weights("s3://acme/sql", anonymous=True)})
    assert lora == LoRA(adapters={"legal": "acme/legal@v3", "sql": Weights("s3://acme/sql", anonymous=True)})
    assert LoRA.model_validate(lora.model_dump(mode="json")) == lora and as_lora(None) is None
    with pytest.raises(SpecError, match="lora=7: must be a place"):
        as_lora(7)


def test_max_rank_is_sufficient_for_the_adapters() -> None:
    lora = LoRA("s3://a/b")
    max_ranks = [lora.with_max_rank(ranks, None).max_rank for ranks in ([], [0], [8, 4], [24, 0], [999])]
    assert max_ranks == [64, 64, 16, 32, 512]
    previous = LoRA("s3://a/b", max_rank=128, max_loaded=2)
    assert lora.with_max_rank([24], previous).max_rank == 128, "a smaller rank does not cause a restart"
    assert lora.with_max_rank([200], previous).max_rank == 256
    assert lora.with_max_rank([24], LoRA("s3://other", max_rank=128)).max_rank == 128, "nor do other sources"
    assert LoRA("s3://a/b", max_rank=8).with_max_rank([24], previous).max_rank == 8
    assert read_lora_rank('{"r": 8, "rank_pattern": {"q_proj": 64, "v_proj": 4}}') == 64
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
            read_lora_rank(config)


def test_each_folder_is_one_adapter() -> None:
    both = ("adapter_config.json", "adapter_model.safetensors")
    names = [f"{folder}/{name}" for folder in ("one", "two") for name in both]
    more = [
        "one/adapter_model.bin",
        "one/README.md",
        "half/adapter_config.json",
        *(f"bad name/{name}" for name in both),
    ]
    listed = Pin(weights=Weights("s3://acme/all"), files=files(*names, *more))
    adapters = find_adapters(listed)
    assert adapters.keys() == {"one", "two"}
    pin = adapters["one"].pin
    assert pin.weights.source == "s3://acme/all/one" and [file.name for file in pin.files] == list(both)
    assert pin.id != adapters["two"].pin.id
    hub = find_adapters(Pin(weights=Weights("acme/all@v1"), revision="c" * 40, files=files(*names)))
    assert (hub["two"].folder, hub["two"].pin.revision) == ("two", "c" * 40)
    assert [file.name for file in hub["two"].pin.files] == [f"two/{name}" for name in both]
    single = find_adapters(Pin(weights=Weights("acme/legal@v3"), revision="c" * 40, files=files(*both, "README.md")))
    assert single.keys() == {"legal"} and single["legal"].folder == ""


def test_what_looks_like_an_adapter_and_is_none_has_a_reason() -> None:
    both = ("adapter_config.json", "adapter_model.safetensors")
    good, odd = ("one", "v1.0"), ("über", "a b", "a:b", "a@1", "-x")
    folders = (*good, *odd, "team/two", "one/checkpoint-500")
    names = [f"{folder}/{name}" for folder in folders for name in both]
    more = ["half/adapter_config.json", "other/adapter_model.bin", "docs/README.md", "model.safetensors"]
    listed = Pin(weights=Weights("s3://acme/all"), files=files(*names, *more))
    assert find_adapters(listed).keys() == {*good}
    skipped = find_skipped(listed)
    assert skipped.keys() == {*odd, "team/two", "half", "other"}
    assert all("its name must be letters, digits" in skipped[folder] for folder in odd)
    assert "nested" in skipped["team/two"]
    assert skipped["half"] == "it has no adapter_model.safetensors"
    assert skipped["other"] == "it has no adapter_config.json"
    many = Pin(weights=Weights("s3://acme/all"), files=files(*(f"x {n}/{name}" for n in range(99) for name in both)))
    assert len(find_skipped(many)) == 20


def test_a_local_folder_is_a_source_too(tmp_path: Path) -> None:
    make_adapter(tmp_path / "one", seed=1)
    first = find_adapters(ObjectStore(Weights(str(tmp_path)), 1).list_files())
    assert first.keys() == {"one"} and first["one"].pin.weights.path == str(tmp_path / "one")
    make_adapter(tmp_path / "one", seed=2)
    assert find_adapters(ObjectStore(Weights(str(tmp_path)), 1).list_files())["one"].pin.id != first["one"].pin.id


def table(**more: Any) -> Table:
    """Return a routing table with one model with adapters and one without."""
    fields: dict[str, Any] = {"lora": True, "adapters": {"legal": "pin-1", "sql": "pin-2"}} | more
    models = {"one": route(1, **fields), "two": route(2, name="two", names=("two",))}
    return Table("e", 1, models, by_names(models))


def test_adapter_names_in_requests() -> None:
    target = find_target(table(), "org/one:legal")
    assert (target.model.name, target.name, target.adapter, target.pin) == ("one", "org/one", "legal", "pin-1")
    assert find_target(table(), "one").adapter == ""
    for name, status, message in (
        ("one:legl", 404, "adapter 'legl' of one not found. Did you mean one:legal?"),
        ("one:xyz", 404, "Available: 2 (see GET /v1/models)"),
        ("two:legal", 404, "two has no adapters"),
        ("three:legal", 404, "model 'three:legal' not found"),
    ):
        with pytest.raises(HTTPError) as refused:
            find_target(table(), name)
        assert refused.value.status == status and message in refused.value.message
    with pytest.raises(HTTPError) as refused:
        find_target(table(adapters=None, adapters_error="access denied"), "one:legal")
    assert refused.value.status == 503 and refused.value.cause == "access denied" and refused.value.retry_after


def test_suggestions_among_ten_thousand_adapters_take_milliseconds() -> None:
    many = table(adapters={f"customer-{number:05d}-legal": "pin" for number in range(10_000)})
    started = time.perf_counter()
    with pytest.raises(HTTPError, match="Did you mean one:customer-01234-legal"):
        find_target(many, "one:customer-1234-legal")
    assert time.perf_counter() - started < 0.05


def test_replicas_with_the_adapter_are_preferred_unless_overloaded() -> None:
    has = {"a": "", "b": "x", "c": "x"}
    replicas = tuple(ReplicaRoute(name, "h", 1, "t", frozenset(pins)) for name, pins in has.items())
    model = route(replicas=replicas, max_ongoing=100)

    def chosen(**in_flight: int) -> str:
        replica = choose(model, in_flight, adapter="x")
        assert replica
        return replica.id

    assert chosen() == "b" and chosen(b=1) == "c"
    assert chosen(b=AFFINITY_SLACK + 1, c=AFFINITY_SLACK) == "c"
    assert chosen(b=AFFINITY_SLACK + 1, c=AFFINITY_SLACK + 1) == "a"


@pytest.mark.parametrize("models", [("org/one:legal",), ("one:legal", "two")])
def test_a_key_can_be_limited_to_one_adapter(models: tuple[str, ...]) -> None:
    key, model = KeyInfo(name="few", models=models), table().models["one"]
    assert can_access(key, model, "legal") and not can_access(key, model, "sql") and not can_access(key, model)
    for name in ("one", "one:sql", "one:sq", "one:sql@v3", "one:none"):
        with pytest.raises(HTTPError) as refused:
            find_target(table(), name, partial(can_access, key))
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
        assert refused.value.message.startswith(f"model {name!r} not found")
        assert "Available: one:legal" in refused.value.message, "the same for what exists and what does not"
        assert "sql" not in refused.value.message.partition("not found")[2]
    assert find_target(table(), "one:legal", partial(can_access, key)).adapter == "legal"
    whole = KeyInfo(name="all", models=("one",))
    assert can_access(whole, model) and can_access(whole, model, "sql")
    assert can_access(key, model, "legal@v3") and not can_access(key, model, "sql@v3")


async def test_only_models_that_the_key_can_access_are_listed(bench: Bench) -> None:
    all_keys = keys(KeyInfo(name="few", models=("one:legal",)))
    bench.table(route(1, lora=True, adapters={"legal": "pin-1", "sql": "pin-2"}), keys=all_keys)
    async with bench.session.get(bench.url + "/v1/models", **bearer("few")) as answer:
        assert [model["id"] for model in (await answer.json())["data"]] == ["one:legal", "org/one:legal"]
    for name, status in (("one:legal", 200), ("one:sql", 404), ("one", 404)):
        async with bench.session.get(f"{bench.url}/v1/models/{name}", **bearer("few")) as answer:
            assert answer.status == status, name


LORA = LoRA("s3://acme/all", refresh=1)


class Source:
    """A fake WeightsCatalog: a source with adapters, or with an error."""

    def __init__(self, *names: str) -> None:
        self.error = ""
        self.unchanged = 0
        """How many listings were known."""
        self.available = asyncio.Event()
        """Replies wait until it is set."""
        self.available.set()
        self.set_adapters(*names)

    def set_adapters(self, *names: str) -> None:
        """Replace the adapters."""
        files = ("adapter_config.json", "adapter_model.safetensors")
        listed = tuple(File(name=f"{name}/{file}", size=1, version="1") for name in names for file in files)
        self.adapters = list(find_adapters(Pin(weights=Weights("s3://acme/all"), files=listed)).values())

    async def list_adapters(self, *args: Any, **__: Any) -> AdapterListing:
        """Return the adapters, unless the caller knows them, or raise WeightsError."""
        await self.available.wait()
        if self.error:
            raise WeightsError(self.error)
        known, digest = args[4] if len(args) > 4 else "", str([adapter.pin.id for adapter in self.adapters])
        self.unchanged += known == digest
        return AdapterListing(digest=digest, adapters=None if known == digest else tuple(self.adapters))


@contextlib.asynccontextmanager
async def running_catalog(
    source: Source, database: Database, lora: LoRA = LORA
) -> AsyncIterator[tuple[AdaptersCatalog, dict[str, Any]]]:
    """Run the catalog of one model; also yields what it publishes to the ingresses, by model."""
    published: dict[str, Any] = {}

    def publish(model: str, pins: dict[str, str] | None, error: str) -> None:
        published[model] = (pins, error)

    models = Models()
    models.put(deployed(spec(lora=lora)))
    weights: Any = source
    catalog = AdaptersCatalog(models, weights, database, publish)
    catalog.load()
    running = asyncio.create_task(catalog.run())
    try:
        yield catalog, published
    finally:
        running.cancel()
        await asyncio.gather(running, *catalog._refreshes.values(), return_exceptions=True)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition is met."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_failed_or_empty_listing_removes_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    source = Source("legal", "sql")
    async with running_catalog(source, database) as (catalog, published):
        await eventually(lambda: "one" in published)
        first = published["one"]
        assert first[0].keys() == {"legal", "sql"} and catalog.has("one", "sql") and not catalog.has("one", "law")
        for source.error, names in (("unavailable", ["legal", "sql"]), ("", [])):
            source.set_adapters(*names)
            before = catalog._listings["one"].listed_at
            await eventually(lambda before=before: catalog._listings["one"].listed_at > before)  # type: ignore[misc]
            assert published["one"] == first
    source.error = "unavailable"
    async with running_catalog(source, database) as (catalog, published):
        assert published["one"] == first
        assert catalog.find("one", "sql", first[0]["sql"]).name == "sql"
        source.error = ""
        source.set_adapters("legal", "law")
        await eventually(lambda: published["one"][0].keys() == {"legal", "law"})
        assert catalog.find("one", "sql", first[0]["sql"]).name == "sql", "for requests that were admitted before"
    database.remove(["one"])
    async with running_catalog(Source("new"), database) as (_, published):
        assert published == {}
    database.close()


async def test_a_listing_that_has_not_changed_is_not_sent(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    source = Source("legal", "sql")
    async with running_catalog(source, database) as (catalog, published):
        await eventually(lambda: source.unchanged > 1)
        assert published["one"][0].keys() == {"legal", "sql"}
        source.set_adapters("legal", "law")
        await eventually(lambda: published["one"][0].keys() == {"legal", "law"})
        source.set_adapters()  # the last listing stays, and is not what the source has
        before = catalog._listings["one"].listed_at
        await eventually(lambda: catalog._listings["one"].listed_at > before)
        assert catalog._listings["one"].digest == ""
        source.set_adapters("new")
        await eventually(lambda: published["one"][0].keys() == {"new"})
        unchanged = source.unchanged
        await eventually(lambda: source.unchanged > unchanged)
        assert published["one"][0].keys() == {"new"}
    database.close()


async def test_a_redeploy_while_the_source_is_empty_removes_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    source = Source("legal", "sql")
    async with running_catalog(source, database) as (catalog, published):
        await eventually(lambda: "one" in published)
        source.set_adapters()
        await catalog.with_max_rank(spec(lora=LORA, max_replicas=2), CPU, fresh=True)
        catalog.activate("one")
        assert published["one"][0].keys() == {"legal", "sql"}
    database.close()


async def test_an_unavailable_source_does_not_block_the_others(tmp_path: Path) -> None:
    class Sources:
        """A fake WeightsCatalog with one adapter at each source."""

        def __init__(self) -> None:
            self.unavailable: set[str] = set()
            self.version = "1"

        async def list_adapters(self, weights: Weights, *_: Any, **__: Any) -> AdapterListing:
            if weights.source in self.unavailable:
                raise WeightsError(f"{weights.source} is unavailable")
            names = ("adapter_config.json", "adapter_model.safetensors")
            listed = tuple(File(name=name, size=1, version=self.version) for name in names)
            return AdapterListing(digest="", adapters=tuple(find_adapters(Pin(weights=weights, files=listed)).values()))

    database, sources = Database(f"sqlite:///{tmp_path}/control.db"), Sources()
    named = LoRA(adapters={"a": "s3://acme/a", "b": "s3://acme/b"}, refresh=1)
    async with running_catalog(sources, database, named) as (catalog, published):  # type: ignore[arg-type]
        await eventually(lambda: "one" in published)
        before = published["one"][0]
        sources.unavailable, sources.version = {"s3://acme/a"}, "2"
        await eventually(lambda: published["one"][0]["b"] != before["b"])
        assert published["one"][0]["a"] == before["a"]
        with pytest.raises(WeightsError, match="s3://acme/a is unavailable"):
            await catalog.with_max_rank(spec(lora=named), CPU, fresh=True)
    database.close()


async def test_the_engine_receives_the_admitted_adapter(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, lora=True, adapters={"legal": "pin-1"}))
    assert (await bench.post({"model": "one:legal"}, headers={ADAPTER_HEADER: "other pin-9"}))[0] == 200
    assert (await bench.post(headers={ADAPTER_HEADER: "other pin-9"}))[0] == 200
    adapted, plain = engine.requests
    assert adapted.headers.getlist(ADAPTER_HEADER) == ["legal pin-1"] and ADAPTER_HEADER not in plain.headers
    async with bench.session.get(bench.url + "/v1/models/one:legal") as answer:
        listed = await answer.json()
    assert (listed["id"], listed["parent"]) == ("one:legal", "one")


async def test_listing_ten_thousand_adapters_does_not_block_the_loop(bench: Bench) -> None:
    many = {f"customer-{number:05d}": f"pin-{number}" for number in range(10_000)}
    bench.table(route(1, lora=True, adapters=many))
    pauses, ended = [], False

    async def tick() -> None:
        while not ended:
            started = time.perf_counter()
            await asyncio.sleep(0)
            pauses.append(time.perf_counter() - started)

    ticking = asyncio.create_task(tick())
    async with bench.session.get(bench.url + "/v1/models") as answer:
        raw = await answer.read()
    ended = True
    await ticking
    listed = json.loads(raw)["data"]
    assert len(listed) == 20_002 and listed[2]["id"] == "one:customer-00000" and listed[2]["parent"] == "one"
    assert sorted(pauses)[-5] < 0.02, "the loop is never blocked for long (the machine may cause rare pauses)"


async def test_only_the_revision_in_lora_is_available(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    pin = Pin(weights=Weights("acme/legal@v3"), revision="c" * 40, files=files("adapter_config.json"))
    source = Source()
    source.adapters = [Adapter(name="legal", pin=pin)]
    lora = LoRA(adapters={"legal": "acme/legal@v3", "free": "acme/free"})
    async with running_catalog(source, database, lora) as (catalog, published):
        await eventually(lambda: bool(published.get("one", [None])[0]))
        assert (await catalog.revision("one", "legal@v3")).pin == pin.id
        refused = await catalog.revision("one", "free@v0")
        assert refused.missing and "the adapter in acme/free@v0 has no adapter_model.safetensors" in refused.error
        weights = File(name="adapter_model.safetensors", size=8 * 2**30, version="1")
        large = pin.model_copy(update={"files": (*pin.files, weights)})
        source.adapters = [Adapter(name="legal", pin=large)]
        refused = await catalog.revision("one", "free@v2")
        assert refused.missing and "has 8.0 GiB, more than 8 GiB" in refused.error
        small = pin.model_copy(update={"files": (*pin.files, weights.model_copy(update={"size": 1}))})
        source.adapters = [Adapter(name="legal", pin=small)]
        assert (await catalog.revision("one", "free@v1")).pin == small.id
        other = await catalog.revision("one", "legal@v2")
        assert other.missing and "lora= of one allows only revision v3 of acme/legal" in other.error
    database.close()


async def test_a_redeploy_with_other_sources_publishes_its_own_listing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    source = Source("legal")
    async with running_catalog(source, database) as (catalog, published):
        await eventually(lambda: "one" in published)
        source.set_adapters("sql")
        source.available.clear()  # a listing of the old sources is in progress…
        await eventually(lambda: bool(catalog._refreshes))
        late = catalog._refreshes["one"]
        row = catalog._models.deployed["one"]
        lora = LoRA("s3://acme/more", refresh=60)
        adapters = {adapter.name: adapter for adapter in Source("law").adapters}
        catalog._planned["one"] = ModelAdapters(lora, adapters, listed_at=1e9)
        catalog._models.deployed["one"] = replace(row, spec=row.spec.model_copy(update={"lora": lora}))
        catalog.activate("one")
        assert published["one"][0].keys() == {"law"}
        source.available.set()
        assert not await late, "…and does not change anything"
        assert published["one"][0].keys() == {"law"}
    database.close()


def test_names_of_keys_are_checked(tmp_path: Path) -> None:
    models = Models()
    models.put(deployed(spec(aliases=["uno"])))
    database = Database(f"sqlite:///{tmp_path}/control.db")
    catalog = AdaptersCatalog(models, Source(), database, lambda *_: None)  # type: ignore[arg-type]
    catalog._listings["one"] = ModelAdapters(LORA, {adapter.name: adapter for adapter in Source("legal").adapters})
    catalog.check_names(["one", "uno", "uno:legal"])
    for name, message in (
        ("two", "model 'two' not found; available: one, uno"),
        ("one:sql", "adapter 'one:sql' not found: see `llmrun adapter list one`"),
    ):
        with pytest.raises(Refused, match=re.escape(message)):
            catalog.check_names([name])
    database.close()


def test_a_new_commit_keeps_the_cached_ranks() -> None:
    def at(commit: str, config: str) -> Adapter:
        files = (File(name="a/adapter_config.json", size=1, digests={"git": config}),)
        return Adapter(name="a", pin=Pin(weights=Weights("org/a"), revision=commit, files=files))

    assert at("1" * 40, "x").config_id == at("2" * 40, "x").config_id != at("2" * 40, "y").config_id
    assert at("1" * 40, "x").pin.id != at("2" * 40, "x").pin.id


async def test_stored_adapters_that_cannot_be_read_are_listed_again(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    async with running_catalog(Source("legal"), database) as (_, published):
        await eventually(lambda: "one" in published)
    later = json.dumps({**json.loads(LORA.model_dump_json()), "of_a_later_release": 1})
    for lora, kept in (('{"refresh": "never"}', False), (later, True)):
        with database.session() as session, session.begin():
            session.scalars(select(AdaptersRow)).one().lora = lora
        source = Source("sql")
        source.error = "unavailable"
        async with running_catalog(source, database) as (_, published):
            names = published["one"][0].keys() if "one" in published else set()
            assert names == ({"legal"} if kept else set())
    database.close()
