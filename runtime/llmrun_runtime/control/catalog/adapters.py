"""Each model's adapters: listed at their sources on a deploy, and again every `refresh` seconds.

The last listing is stored, so that control has it after a restart even if a source is unavailable.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from pydantic import TypeAdapter

from llmrun.errors import LLMRunError, NotFound, Refused, WeightsError
from llmrun.lora import ADAPTER_WEIGHTS, LoRA, split_revision
from llmrun.spec import ModelSpec
from llmrun.weights import Weights
from llmrun.wire import MAX_ADAPTER_BYTES, AdapterRow
from llmrun_runtime.control.catalog.adapter_revisions import AdapterRevisions
from llmrun_runtime.control.catalog.adapter_sources import ModelAdapters, list_sources, unless_empty
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.control.state.stored_json import read_stored, read_stored_dict
from llmrun_runtime.control.state.tables import AdaptersRow
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.wire.reports import AdapterRevision, ReplicaReport

log = logging.getLogger("llmrun.control")
TICK_S = 0.5
KEEP_PLANNED_S = 3600
ADAPTERS_JSON = TypeAdapter(dict[str, Adapter])
Publish = Callable[[str, dict[str, str] | None, str], None]
"""Called with a model, its adapters' pins by name (None if they could not be listed), and the error."""


class AdaptersCatalog:
    """The adapters of all active models."""

    def __init__(self, models: Models, weights: WeightsCatalog, database: Database, publish: Publish) -> None:
        self._database = database
        self._models = models
        self._publish = publish
        self._weights = weights
        self._listings: dict[str, ModelAdapters] = {}
        self._planned: dict[str, ModelAdapters] = {}
        """The listings of models that are being deployed."""
        self._revisions = AdapterRevisions(self._resolve_revision)
        self._refreshes: dict[str, asyncio.Task[bool]] = {}
        self._retry_after: dict[str, float] = {}
        """When to retry the models that were never listed successfully; in seconds of the monotonic clock."""
        self._last_used: dict[str, dict[str, float]] = {}
        """Unix times, by model and adapter name."""

    def load(self) -> None:
        """Load the stored listings of the active models. All of them are refreshed at once."""
        with self._database.session() as session:
            for model, active in self._models.deployed.items():
                row, lora = session.get(AdaptersRow, model), active.spec.lora
                if not row or not lora:
                    continue
                try:
                    adapters, listed = read_stored_dict(Adapter, row.adapters), read_stored(LoRA, row.lora)
                except ValueError as error:
                    log.warning("the stored adapters of %s cannot be read, so they are listed again: %s", model, error)
                    continue
                stored = ModelAdapters(listed, adapters, listed_at=-lora.refresh)
                if stored.is_of(lora):
                    self._listings[model] = stored
                    self._publish_pins(model)

    def report(self, report: ReplicaReport, now: float) -> None:
        """Record which adapters a replica has served since its last report."""
        for _, adapter, *_ in report.usage:
            name, _ = split_revision(adapter.partition(":")[2])
            if self.has(report.model, name):
                self._last_used.setdefault(report.model, {})[name] = now

    def has(self, model: str, name: str) -> bool:
        """Whether the model has an adapter of that name."""
        listing = self._listings.get(model)
        return listing is not None and name in listing.adapters

    def check_names(self, names: Iterable[str]) -> None:
        """Raise Refused (404) for a name that is neither a served name of a model nor its `name:adapter`."""
        models = {name: row.name for row in self._models.deployed.values() for name in row.spec.served_names}
        for name in names:
            base, _, adapter = name.partition(":")
            if name in models or (adapter and base in models and self.has(models[base], adapter)):
                continue
            if adapter and base in models:
                raise Refused(f"adapter {name!r} not found: see `llmrun adapter list {base}`", 404)
            raise Refused(f"model {name!r} not found; available: {', '.join(sorted(models)) or 'none'}", 404)

    async def with_max_rank(self, spec: ModelSpec, placement: Placement, *, fresh: bool) -> ModelSpec:
        """Return the spec of a model to be deployed, with the maximum rank that its adapters need.

        `fresh`: list the sources now, instead of using the last listing. Raises LLMRunError.
        """
        name, lora = spec.name, spec.lora
        if not lora:
            return spec
        candidates = (self._planned.get(name), self._listings.get(name))
        listing = next((candidate for candidate in candidates if candidate and candidate.is_of(lora)), None)
        if fresh or not listing:
            listed = await list_sources(self._weights, lora, spec.env, placement, listing, strict=True)
            listing = self._planned[name] = unless_empty(name, listed, listing)
        active = self._models.deployed.get(name)
        lora = lora.with_max_rank(listing.ranks.values(), active.spec.lora if active else None)
        return spec.model_copy(update={"lora": lora})

    async def revision(self, model: str, revised: str) -> AdapterRevision:
        """Resolve `revised`, an `adapter@revision` of a model, and publish it to the ingresses."""
        active, listing = self._models.deployed.get(model), self._listings.get(model)
        if not active or not active.spec.lora or not listing:
            return AdapterRevision(error=f"{model} has no adapters", missing=True)
        reply = await self._revisions.find(model, revised, active.spec.lora.refresh)
        if reply.pin and model in self._models.deployed:
            self._publish_pins(model)
        return reply

    async def _resolve_revision(self, model: str, name: str, revision: str) -> Adapter:
        """Return an adapter at a revision. Raises LLMRunError; NotFound if it does not exist."""
        active = self._models.deployed.get(model)
        lora = active.spec.lora if active else None
        listing = self._listing_of(model, lora)
        if not active or not lora or not listing or name not in listing.adapters:
            raise NotFound(f"adapter {name!r} of {model} not found")
        source = lora.path or lora.adapters[name]
        if source.kind != "hub":
            raise NotFound(
                f"revisions of {source} are not supported: only repositories of the Hugging Face Hub have them"
            )
        if "@" in source.address and source.revision != revision:
            raise NotFound(f"lora= of {model} allows only revision {source.revision} of {source.repo}")
        by_owner = "@" in source.address
        source = source.model_copy(update={"source": f"{source.repo}@{revision}"})
        folder = listing.adapters[name].folder
        listed = await self._weights.list_adapters(
            source, active.spec.env, active.placement, None, published=not by_owner
        )
        for adapter in listed.adapters or ():
            if adapter.folder == folder:
                if not by_owner:
                    _check_chosen(adapter, source)
                return adapter.model_copy(update={"name": name})
        raise NotFound(f"adapter {name!r} not found in {source}")

    def find(self, model: str, name: str, pin_id: str) -> Adapter:
        """Return the adapter that a request was admitted for. Raises WeightsError if it is no longer available."""
        listing = self._listings.get(model)
        for adapters in (listing.adapters, listing.previous) if listing else ():
            if name in adapters and adapters[name].pin.id == pin_id:
                return adapters[name]
        for revised in self._revisions.adapters(model, name):
            if revised.pin.id == pin_id:
                return revised
        raise WeightsError(f"adapter {name} of {model} was changed or removed during the request. Try again")

    def rows(self, model: str, registry: Registry) -> list[AdapterRow]:
        """Return a model's adapters, sorted by name. Raises Refused if it was deployed without `lora=`."""
        active = self._models.deployed.get(model)
        if not active or not active.spec.lora:
            raise Refused(f"{model} has no adapters: set lora= in its @llm", 409)
        listing = self._listing_of(model, active.spec.lora)
        return [
            AdapterRow(
                name=name,
                source=str(adapter.pin.weights),
                short=adapter.pin.short,
                bytes=adapter.pin.total,
                rank=adapter.rank,
                loaded_on=tuple(r.id[:12] for r in registry.replicas_of(model) if adapter.pin.id in r.adapters),
                last_used=self._last_used.get(model, {}).get(name, 0),
            )
            for name, adapter in sorted(listing.adapters.items() if listing else ())
        ] + [
            AdapterRow(name=name, source=active.spec.lora.location, short="", bytes=0, problem=problem)
            for name, problem in (listing.skipped.items() if listing else ())
        ]

    def skipped(self, spec: ModelSpec) -> dict[str, str]:
        """Return what the listing for a deploy of this spec left out, with the reasons."""
        listings = (self._planned.get(spec.name), self._listings.get(spec.name))
        return next((listing.skipped for listing in listings if listing and listing.is_of(spec.lora)), {})

    async def run(self) -> None:
        """Refresh the listings as they fall due, indefinitely."""
        while True:
            for active in self._due():
                self._start_refresh(active)
            await asyncio.sleep(TICK_S)

    async def refresh(self, model: str) -> bool:
        """List a model's adapters now. Return whether that succeeded.

        A refresh in progress may have read the sources before the call, so another one follows it.
        """
        while task := self._refreshes.get(model):
            await asyncio.wait([task])
        if active := self._models.deployed.get(model):
            task = self._start_refresh(active)
            await asyncio.wait([task])
            return not task.cancelled() and not task.exception() and task.result()
        return False

    def _start_refresh(self, active: Deployed) -> asyncio.Task[bool]:
        task = self._refreshes[active.name] = asyncio.get_running_loop().create_task(self._refresh_model(active))
        task.add_done_callback(functools.partial(self._refresh_done, active.name))
        return task

    def _refresh_done(self, model: str, task: asyncio.Task[bool]) -> None:
        del self._refreshes[model]
        if not task.cancelled() and (error := task.exception()):
            log.error("listing the adapters of %s failed", model, exc_info=error)

    def _due(self) -> Iterator[Deployed]:
        """Forget models that are no longer deployed; yield those whose listing is older than `refresh`."""
        now, deployed = time.monotonic(), self._models.deployed
        self._last_used = {model: used for model, used in self._last_used.items() if model in deployed}
        self._listings = {model: listing for model, listing in self._listings.items() if model in deployed}
        self._retry_after = {model: when for model, when in self._retry_after.items() if when > now}
        self._planned = {
            model: planned for model, planned in self._planned.items() if now - planned.listed_at < KEEP_PLANNED_S
        }
        for active in deployed.values():
            lora = active.spec.lora
            if lora is None or active.name in self._refreshes:
                continue
            if listing := self._listing_of(active.name, lora):
                if now - listing.listed_at >= lora.refresh:
                    yield active
            elif now >= self._retry_after.get(active.name, 0):
                yield active

    async def _refresh_model(self, row: Deployed) -> bool:
        """Return whether the listing succeeded. A failed listing, or one that is empty now, removes no adapters."""
        lora = row.spec.lora
        assert lora
        try:
            last = self._listings.get(row.name)
            listed = await list_sources(self._weights, lora, row.spec.env, row.placement, last)
        except LLMRunError as error:
            log.warning("adapters of %s: %s", row.name, error)
            if listing := self._listing_of(row.name, lora):
                listing.listed_at = time.monotonic()
                return False
            self._publish(row.name, None, str(error))
            self._retry_after[row.name] = time.monotonic() + lora.refresh / 4
            return False
        active = self._models.deployed.get(row.name)
        if not active or not listed.is_of(active.spec.lora):
            return False  # another deploy has changed the sources, and published its own listing
        listed = unless_empty(row.name, listed, self._listing_of(row.name, lora))
        if self._update(row.name, listed):
            await self._database.run(self._store, row.name, self._listings[row.name])
        if row.name in self._models.deployed:
            self._publish_pins(row.name)
        return True

    def _listing_of(self, model: str, lora: LoRA | None) -> ModelAdapters | None:
        """Return the model's listing, if it is of these sources."""
        listing = self._listings.get(model)
        return listing if listing and listing.is_of(lora) else None

    def _update(self, model: str, listed: ModelAdapters) -> bool:
        """Replace the model's listing. Return whether its adapters have changed."""
        listing, adapters = self._listings.get(model), listed.adapters
        if listing and listing.is_of(listed.lora) and listing.adapters == adapters:
            listing.listed_at, listing.digest, listing.skipped = time.monotonic(), listed.digest, listed.skipped
            return False  # keep these objects: their pins have cached their IDs
        previous: dict[str, Adapter] = {}
        if listing:
            previous = listing.previous if _pins(listing.adapters) == _pins(adapters) else listing.adapters
        self._listings[model] = replace(listed, previous=previous, listed_at=time.monotonic())
        used = self._last_used.get(model, {})
        self._last_used[model] = {name: when for name, when in used.items() if name in adapters}
        return True

    def _store(self, model: str, listing: ModelAdapters) -> None:
        lora, adapters = listing.lora.model_dump_json(), ADAPTERS_JSON.dump_json(listing.adapters).decode()
        with self._database.session() as session, session.begin():
            session.merge(AdaptersRow(model=model, lora=lora, adapters=adapters))

    def activate(self, model: str) -> None:
        """Publish the adapters of a version that has just become active, from its plan's listing or the last one."""
        lora = self._models.deployed[model].spec.lora
        listing, planned = self._listing_of(model, lora), self._planned.pop(model, None)
        if not listing:
            self._revisions.forget(model)
        if lora and planned and planned.is_of(lora) and (listing is None or planned.listed_at > listing.listed_at):
            self._update(model, planned)
        if listing := self._listing_of(model, lora):
            self._database.submit(self._store, model, listing)
            self._publish_pins(model)

    def _publish_pins(self, model: str) -> None:
        listing, lora = self._listings[model], self._models.deployed[model].spec.lora
        assert lora
        self._revisions.keep(model, listing.adapters)
        pins = dict(sorted(_pins(listing.adapters).items()))
        self._publish(model, pins | self._revisions.pins(model, lora.refresh), "")


def _pins(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    return {name: adapter.pin.id for name, adapter in adapters.items()}


def _check_chosen(adapter: Adapter, source: Weights) -> None:
    """Raise NotFound for an adapter that a client must not choose: its files are not what the deploy listed.

    A larger one would take other weights' place on the nodes; files of PyTorch's format are pickles.
    """
    if adapter.pin.total > MAX_ADAPTER_BYTES:
        size = f"{adapter.pin.total / 2**30:.1f} GiB, more than {MAX_ADAPTER_BYTES / 2**30:g} GiB"
        raise NotFound(f"the adapter in {source} has {size}")
    if not any(file.name.rpartition("/")[2] == ADAPTER_WEIGHTS for file in adapter.pin.files):
        raise NotFound(f"the adapter in {source} has no {ADAPTER_WEIGHTS}")
