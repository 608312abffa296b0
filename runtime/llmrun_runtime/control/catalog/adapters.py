"""Which adapters there are, by model: asked of their sources at the deploy, and again every `refresh` seconds.

What was last heard is stored, so that a control that comes back knows it while a store is away.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from llmrun.errors import LLMRunError, NotFound, Refused, WeightsError
from llmrun.lora import LoRA
from llmrun.spec import ModelSpec, Secret
from llmrun.weights import Weights
from llmrun.wire import AdapterRow
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.catalog.adapter_revisions import AdapterRevisions
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.control.state.tables import AdaptersRow
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.wire.reports import AdapterRevision, ReplicaReport

log = logging.getLogger("llmrun.control")
TICK_S = 0.5
FORGET_S = 3600
MANY = TypeAdapter(dict[str, Adapter])


@dataclass
class ModelAdapters:
    """One model's adapters by name; `before`: what they meant until the last change, for requests under way."""

    lora: LoRA
    """Whose `sources` they are of."""
    adapters: dict[str, Adapter]
    before: dict[str, Adapter] = field(default_factory=dict)
    looked: float = 0
    """Of the monotonic clock."""

    def is_of(self, lora: LoRA | None) -> bool:
        """Whether these are the adapters that `lora` names."""
        return lora is not None and self.lora.sources == lora.sources

    @property
    def ranks(self) -> dict[str, int]:
        """By the configurations' ids."""
        return {adapter.config_id: adapter.rank for adapter in self.adapters.values()}


class AdaptersCatalog:
    """The adapters of all models in force."""

    def __init__(self, scaling: Autoscaler, stock: WeightsCatalog, database: Database) -> None:
        self._database = database
        self._scaling = scaling
        self._stock = stock
        self._known: dict[str, ModelAdapters] = {}
        self._planned: dict[str, ModelAdapters] = {}
        """Of models that are to be deployed."""
        self._revisions = AdapterRevisions(self._at)
        self._looking: dict[str, asyncio.Task[bool]] = {}
        self._again: dict[str, float] = {}
        """Until when models are left alone whose adapters could never be listed; of the monotonic clock."""
        self._used: dict[str, dict[str, float]] = {}
        """By model and name, when (Unix time)."""

    def load(self) -> None:
        """Take up what is stored of the models in force; all of them are asked for again at once."""
        with self._database.session() as session:
            for model in self._scaling.deployed:
                row = session.get(AdaptersRow, model)
                lora = self._scaling.deployed[model].spec.lora
                if row and lora and LoRA.model_validate_json(row.lora).sources == lora.sources:
                    self._known[model] = ModelAdapters(lora, MANY.validate_json(row.adapters), looked=-lora.refresh)
                    self._tell(model)

    def report(self, report: ReplicaReport, now: float) -> None:
        """Note which adapters a replica has served since its last report."""
        for _, adapter, *_ in report.usage:
            if name := adapter.partition(":")[2]:
                self._used.setdefault(report.model, {})[name] = now

    def has(self, model: str, name: str) -> bool:
        """Whether the model has an adapter of that name."""
        known = self._known.get(model)
        return known is not None and name in known.adapters

    async def settle(self, spec: ModelSpec, placement: Placement, *, ask: bool) -> ModelSpec:
        """A model that is to be deployed, with the rank that its adapters need.

        `ask`: their sources are asked; else what they said at the last plan goes on. Raises LLMRunError.
        """
        name, lora = spec.name, spec.lora
        if not lora:
            return spec
        known = next((c for c in (self._planned.get(name), self._known.get(name)) if c and c.is_of(lora)), None)
        if ask or not known:
            found = _or_before(name, lora, await self._ask(lora, spec.env, placement, known, strict=True), known)
            known = self._planned[name] = ModelAdapters(lora, found, looked=time.monotonic())
        row = self._scaling.deployed.get(name)
        settled = lora.settled(known.ranks.values(), row.spec.lora if row else None)
        return spec.model_copy(update={"lora": settled})

    async def revision(self, model: str, called: str) -> AdapterRevision:
        """What `adapter@revision` of a model means; ingresses know it from now on."""
        row, known = self._scaling.deployed.get(model), self._known.get(model)
        if not row or not row.spec.lora or not known:
            return AdapterRevision(trouble=f"{model} has no adapters", missing=True)
        found = await self._revisions.find(model, called, row.spec.lora.refresh)
        if found.pin and model in self._scaling.deployed:
            self._tell(model)
        return found

    async def _at(self, model: str, name: str, revision: str) -> Adapter:
        """An adapter as it was. Raises LLMRunError; NotThere if it was not."""
        row, known = self._scaling.deployed.get(model), self._known.get(model)
        lora = row.spec.lora if row else None
        if not row or not lora or not known or not known.is_of(lora) or name not in known.adapters:
            raise NotFound(f"{model} has no adapter {name!r}")
        source = lora.path or lora.adapters[name]
        if source.kind != "hub":
            raise NotFound(f"{source} keeps no revisions: only the Hub's repositories do")
        if "@" in source.address and source.revision != revision:
            raise NotFound(f"lora= of {model} names the revision {source.revision} of {source.repo}, and no other")
        source = source.model_copy(update={"source": f"{source.repo}@{revision}"})
        found = await self._stock.adapters(source, row.spec.env, row.placement, None)
        called = known.adapters[name].folder
        for adapter in found:
            if adapter.folder == called:
                return adapter.model_copy(update={"name": name})
        raise NotFound(f"{source} has no adapter {name!r}")

    def find(self, model: str, name: str, pin_id: str) -> Adapter:
        """An adapter, as a request knows it. Raises WeightsError if it is not there any more."""
        known = self._known.get(model)
        for adapters in (known.adapters, known.before) if known else ():
            if name in adapters and adapters[name].pin.id == pin_id:
                return adapters[name]
        for revised in self._revisions.adapters(model, name):
            if revised.pin.id == pin_id:
                return revised
        raise WeightsError(f"the adapter {name} of {model} has just been changed or removed: ask again")

    def rows(self, model: str, registry: Registry) -> list[AdapterRow]:
        """A model's adapters, by name. Raises Refused if it is not made for any."""
        row, known = self._scaling.deployed.get(model), self._known.get(model)
        if not row or not row.spec.lora:
            raise Refused(f"{model} has no adapters: lora= of its @llm says where they lie", 409)
        found = sorted(known.adapters.items()) if known and known.is_of(row.spec.lora) else []
        return [
            AdapterRow(
                name=name,
                source=str(adapter.pin.weights),
                short=adapter.pin.short,
                bytes=adapter.pin.total,
                rank=adapter.rank,
                loaded_on=tuple(r.id[:12] for r in registry.of(model) if adapter.pin.id in r.adapters),
                last_used=self._used.get(model, {}).get(name, 0),
            )
            for name, adapter in found
        ]

    async def run(self) -> None:
        """Look again, for ever."""
        while True:
            for row in self._due():
                self._begin(row)
            await asyncio.sleep(TICK_S)

    async def look(self, model: str) -> bool:
        """Look again now, and return when what the sources have from here on is known; False if it could not be."""
        while under_way := self._looking.get(model):
            await asyncio.wait([under_way])
        if row := self._scaling.deployed.get(model):
            task = self._begin(row)
            await asyncio.wait([task])
            return not task.cancelled() and not task.exception() and task.result()
        return False

    def _begin(self, row: Deployed) -> asyncio.Task[bool]:
        task = self._looking[row.name] = asyncio.get_running_loop().create_task(self._look(row))
        task.add_done_callback(functools.partial(self._looked, row.name))
        return task

    def _looked(self, model: str, task: asyncio.Task[bool]) -> None:
        del self._looking[model]
        if not task.cancelled() and (error := task.exception()):
            log.error("the adapters of %s could not be listed", model, exc_info=error)

    def _due(self) -> Iterator[Deployed]:
        now, deployed = time.monotonic(), self._scaling.deployed
        self._used = {model: used for model, used in self._used.items() if model in deployed}
        self._known = {name: known for name, known in self._known.items() if name in deployed}
        self._again = {model: when for model, when in self._again.items() if when > now}
        self._planned = {name: plan for name, plan in self._planned.items() if now - plan.looked < FORGET_S}
        for row in self._scaling.deployed.values():
            lora, known = row.spec.lora, self._known.get(row.name)
            if lora is None or row.name in self._looking:
                continue
            if known is None or not known.is_of(lora):
                if now >= self._again.get(row.name, 0):
                    yield row
            elif now - known.looked >= lora.refresh:
                yield row

    async def _look(self, row: Deployed) -> bool:
        """Whether they could be listed. A listing that fails, or that has become empty, removes nothing."""
        lora, known = row.spec.lora, self._known.get(row.name)
        assert lora
        try:
            found = await self._ask(lora, row.spec.env, row.placement, known)
        except LLMRunError as error:
            log.warning("the adapters of %s: %s", row.name, error)
            known = self._known.get(row.name)
            if known and known.is_of(lora):
                known.looked = time.monotonic()
                return False
            self._scaling.set_adapters(row.name, None, str(error))
            self._again[row.name] = time.monotonic() + lora.refresh / 4
            return False
        now = self._scaling.deployed.get(row.name)
        if not now or not now.spec.lora or now.spec.lora.sources != lora.sources:
            return False  # another deploy came in between, and has said what there is
        known = self._known.get(row.name)
        found = _or_before(row.name, lora, found, known if known and known.is_of(lora) else None)
        if self._take(row.name, lora, found) and row.name in self._scaling.deployed:
            await asyncio.to_thread(self._store, row.name, self._known[row.name])
        self._tell(row.name)
        return True

    def _take(self, model: str, lora: LoRA, found: dict[str, Adapter]) -> bool:
        """Know them from now on; whether that is something new."""
        known = self._known.get(model)
        if known and known.is_of(lora) and known.adapters == found:
            known.looked = time.monotonic()  # the same objects stay, whose pins have their ids
            return False
        before = {} if known is None else known.before if _pins(known.adapters) == _pins(found) else known.adapters
        self._known[model] = ModelAdapters(lora, found, before, time.monotonic())
        return True

    def _store(self, model: str, known: ModelAdapters) -> None:
        lora, adapters = known.lora.model_dump_json(), MANY.dump_json(known.adapters).decode()
        with self._database.session() as session, session.begin():
            session.merge(AdaptersRow(model=model, lora=lora, adapters=adapters))

    def tell(self, model: str) -> None:
        """Say which adapters a model that has just been put in force has, as far as that is known."""
        lora, known = self._scaling.deployed[model].spec.lora, self._known.get(model)
        planned = self._planned.pop(model, None)
        if not known or not known.is_of(lora):
            known = None
            self._revisions.forget(model)
        if lora and planned and planned.is_of(lora) and (known is None or planned.looked > known.looked):
            self._take(model, lora, planned.adapters)
        if (known := self._known.get(model)) and known.is_of(lora):
            self._store(model, known)
            self._tell(model)

    def _tell(self, model: str) -> None:
        known, lora = self._known[model], self._scaling.deployed[model].spec.lora
        assert lora
        self._revisions.keep(model, known.adapters)
        found = dict(sorted(_pins(known.adapters).items()))
        self._scaling.set_adapters(model, found | self._revisions.pins(model, lora.refresh))

    async def _ask(
        self,
        lora: LoRA,
        env: Mapping[str, Secret | str],
        placement: Placement,
        known: ModelAdapters | None,
        *,
        strict: bool = False,
    ) -> dict[str, Adapter]:
        """All adapters there are now; the ranks of those that are `known` are not read. Raises LLMRunError.

        Of those that are named one by one, each whose source cannot be listed stays as it is known, unless `strict`.
        """
        if lora.path:
            found = await self._stock.adapters(lora.path, env, placement, known.ranks if known else {})
            return {adapter.name: adapter for adapter in found}
        before = known.adapters if known else {}
        one = [self._one(name, where, env, placement, before.get(name)) for name, where in lora.adapters.items()]
        there: dict[str, Adapter] = {}
        errors: list[LLMRunError] = []
        for name, said in zip(lora.adapters, await asyncio.gather(*one, return_exceptions=True), strict=True):
            if isinstance(said, LLMRunError) and not strict:
                log.warning("the adapter %s: %s", name, said)
                errors.append(said)
                there |= {name: before[name]} if name in before else {}
            elif isinstance(said, BaseException):
                raise said
            else:
                there[name] = said
        if len(errors) == len(lora.adapters):
            raise errors[0]
        return there

    async def _one(
        self, name: str, where: Weights, env: Mapping[str, Secret | str], placement: Placement, known: Adapter | None
    ) -> Adapter:
        found = await self._stock.adapters(where, env, placement, {known.config_id: known.rank} if known else {})
        if len(found) != 1:
            what = f"has {len(found)} adapters" if found else "has no adapter (adapter_config.json and its weights)"
            raise WeightsError(f"lora={name!r}: {where} {what}: name the folder of one")
        return found[0].model_copy(update={"name": name})


def _or_before(model: str, lora: LoRA, found: dict[str, Adapter], known: ModelAdapters | None) -> dict[str, Adapter]:
    """What was found; where that has become nothing, those that are `known` stay."""
    if found or not known or not known.adapters:
        return found
    log.warning("the adapters of %s: %s is empty now; those that were there stay", model, lora.places)
    return known.adapters


def _pins(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    return {name: adapter.pin.id for name, adapter in adapters.items()}
