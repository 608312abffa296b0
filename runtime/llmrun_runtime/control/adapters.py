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

from llmrun.errors import LLMRunError, Refused, WeightsError
from llmrun.lora import LoRA
from llmrun.spec import ModelSpec, Secret
from llmrun.weights import Weights
from llmrun.wire import AdapterRow
from llmrun_runtime.control.database import Database, Deployed
from llmrun_runtime.control.placing import Placement
from llmrun_runtime.control.registry import Registry
from llmrun_runtime.control.scaling import Scaling
from llmrun_runtime.control.stock import Stock
from llmrun_runtime.control.tables import AdaptersRow
from llmrun_runtime.reports import Registration
from llmrun_runtime.weights.adapters import Adapter

log = logging.getLogger("llmrun.control")
TICK_S = 0.5
FORGET_S = 3600
MANY = TypeAdapter(dict[str, Adapter])


@dataclass
class Catalogue:
    """One model's adapters by name; `before`: what they meant until the last change, for requests under way."""

    lora: LoRA
    adapters: dict[str, Adapter]
    before: dict[str, Adapter] = field(default_factory=dict)
    looked: float = 0
    """Of the monotonic clock."""


class Adapters:
    """The adapters of all models in force."""

    def __init__(self, scaling: Scaling, stock: Stock, database: Database) -> None:
        self._database = database
        self._scaling = scaling
        self._stock = stock
        self._known: dict[str, Catalogue] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._used: dict[str, dict[str, float]] = {}
        """By model and name, when (Unix time)."""

    def load(self) -> None:
        """Take up what is stored of the models in force; all of them are asked for again at once."""
        with self._database.session() as session:
            for model in self._scaling.deployed:
                row = session.get(AdaptersRow, model)
                if row and (lora := LoRA.model_validate_json(row.lora)) == self._scaling.deployed[model].spec.lora:
                    self._known[model] = Catalogue(lora, MANY.validate_json(row.adapters), looked=-lora.refresh)
                    self._tell(model)

    def report(self, report: Registration, now: float) -> None:
        """Note which adapters a replica has served since its last report."""
        for _, adapter, *_ in report.usage:
            if name := adapter.partition(":")[2]:
                self._used.setdefault(report.model, {})[name] = now

    def has(self, model: str, name: str) -> bool:
        """Whether the model has an adapter of that name."""
        known = self._known.get(model)
        return known is not None and name in known.adapters

    async def check(self, spec: ModelSpec, placement: Placement) -> None:
        """Ask the sources of a model that is to be deployed. Raises LLMRunError if one cannot be asked."""
        if spec.lora:
            self._take(spec.name, spec.lora, await self._ask(spec.lora, spec.env, placement))

    def find(self, model: str, name: str, pin_id: str) -> Adapter:
        """An adapter, as a request knows it. Raises WeightsError if it is not there any more."""
        known = self._known.get(model)
        for adapters in (known.adapters, known.before) if known else ():
            if name in adapters and adapters[name].pin.id == pin_id:
                return adapters[name]
        raise WeightsError(f"the adapter {name} of {model} has just been changed or removed: ask again")

    def rows(self, model: str, registry: Registry) -> list[AdapterRow]:
        """A model's adapters, by name. Raises Refused if it is not made for any."""
        row, known = self._scaling.deployed.get(model), self._known.get(model)
        if not row or not row.spec.lora:
            raise Refused(f"{model} has no adapters: lora= of its @llm says where they lie", 409)
        found = sorted(known.adapters.items()) if known and known.lora == row.spec.lora else []
        return [
            AdapterRow(
                name=name,
                source=str(adapter.pin.weights),
                short=adapter.pin.short,
                bytes=adapter.pin.total,
                loaded_on=tuple(r.id[:12] for r in registry.of(model) if adapter.pin.id in r.adapters),
                last_used=self._used.get(model, {}).get(name, 0),
            )
            for name, adapter in found
        ]

    async def run(self) -> None:
        """Look again, for ever."""
        while True:
            for row in self._due():
                task = asyncio.get_running_loop().create_task(self._look(row))
                self._looking[row.name] = task
                task.add_done_callback(functools.partial(self._looked, row.name))
            await asyncio.sleep(TICK_S)

    def _looked(self, model: str, task: asyncio.Task[None]) -> None:
        del self._looking[model]
        if not task.cancelled() and (error := task.exception()):
            log.error("the adapters of %s could not be listed", model, exc_info=error)

    def _due(self) -> Iterator[Deployed]:
        now, deployed = time.monotonic(), self._scaling.deployed
        self._used = {model: used for model, used in self._used.items() if model in deployed}
        self._known = {  # of a model that is being deployed some are known already
            name: known for name, known in self._known.items() if name in deployed or now - known.looked < FORGET_S
        }
        for row in self._scaling.deployed.values():
            lora, known = row.spec.lora, self._known.get(row.name)
            if lora is None or row.name in self._looking:
                continue
            if known is None or known.lora != lora or now - known.looked >= lora.refresh:
                yield row

    async def _look(self, row: Deployed) -> None:
        """A listing that fails, or that has become empty, removes nothing."""
        lora = row.spec.lora
        assert lora
        try:
            found = await self._ask(lora, row.spec.env, row.placement)
        except LLMRunError as error:
            log.warning("the adapters of %s: %s", row.name, error)
            known = self._known.get(row.name)
            if known and known.lora == lora:
                known.looked = time.monotonic()
                return
            self._scaling.set_adapters(row.name, None, str(error))
            await asyncio.sleep(lora.refresh / 4)
            return
        known = self._known.get(row.name)
        if known and known.lora == lora and known.adapters and not found:
            log.warning("the adapters of %s: %s is empty now; those that were there stay", row.name, lora.places)
            known.looked = time.monotonic()
            return
        self._take(row.name, lora, found)
        changed = known is None or (known.lora, known.adapters) != (lora, found)
        if changed and row.name in self._scaling.deployed:
            await asyncio.to_thread(self._store, row.name, self._known[row.name])
        self._tell(row.name)

    def _take(self, model: str, lora: LoRA, found: dict[str, Adapter]) -> None:
        known = self._known.get(model)
        same = known is not None and known.adapters == found
        before = known.before if known and same else known.adapters if known else {}
        self._known[model] = Catalogue(lora, found, before, time.monotonic())

    def _store(self, model: str, known: Catalogue) -> None:
        lora, adapters = known.lora.model_dump_json(), MANY.dump_json(known.adapters).decode()
        with self._database.session() as session, session.begin():
            session.merge(AdaptersRow(model=model, lora=lora, adapters=adapters))

    def tell(self, model: str) -> None:
        """Say which adapters a model that has just been put in force has, as far as that is known."""
        known, row = self._known.get(model), self._scaling.deployed[model]
        if known and known.lora == row.spec.lora:
            self._store(model, known)
            self._tell(model)

    def _tell(self, model: str) -> None:
        found = {name: adapter.pin.id for name, adapter in sorted(self._known[model].adapters.items())}
        self._scaling.set_adapters(model, found)

    async def _ask(self, lora: LoRA, env: Mapping[str, Secret | str], placement: Placement) -> dict[str, Adapter]:
        """All adapters there are now. Raises LLMRunError."""
        if lora.path:
            return {adapter.name: adapter for adapter in await self._stock.adapters(lora.path, env, placement)}
        one = [self._one(name, where, env, placement) for name, where in lora.adapters.items()]
        return {adapter.name: adapter for adapter in await asyncio.gather(*one)}

    async def _one(self, name: str, where: Weights, env: Mapping[str, Secret | str], placement: Placement) -> Adapter:
        found = await self._stock.adapters(where, env, placement)
        if len(found) != 1:
            what = f"has {len(found)} adapters" if found else "has no adapter (adapter_config.json and its weights)"
            raise WeightsError(f"lora={name!r}: {where} {what}: name the folder of one")
        return found[0].model_copy(update={"name": name})
