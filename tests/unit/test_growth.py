"""A simulated year of control and of an ingress: models, keys and adapters come and go, and nothing grows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import func, select

from llmrun import Weights
from llmrun.errors import NotFound
from llmrun.settings import Settings
from llmrun.spec import Code
from llmrun.wire import ColdStart, KeyInfo
from llmrun_runtime.control import hung_replicas
from llmrun_runtime.control.autoscaling import serve_apps as serve_apps_module
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.catalog.adapter_revisions import AdapterRevisions
from llmrun_runtime.control.catalog.adapter_sources import ModelAdapters
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.control.hung_replicas import HungReplicas
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.control.metrics import ControlMetrics
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.models import Models
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.control.state.tables import Base
from llmrun_runtime.control.usage import Usage
from llmrun_runtime.ingress.admission.rate_limits import Limiter, key_limits, model_limits
from llmrun_runtime.ingress.engine_deaths import EngineDeaths, request_digest
from llmrun_runtime.ingress.queue.claim import Caller, WaitLimit
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.placement import Node
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.reports import LocalUsage, Traffic, model_subject
from llmrun_runtime.wire.routing_table import Table
from tests.support import factories
from tests.support.adapters import files
from tests.support.ingress import route

STEP_S = 4 * 86400.0
EARLY, END = 30, 91  # steps: four months, a year
HISTORY = {"usage", "numbers"}
"""Tables that keep a row for what was deleted: usage is a record, and no version number is used twice."""
LORA = {"sql": "acme/sql"}
PIN = Pin(weights=Weights("acme/sql"), revision="c" * 40, files=files("adapter_config.json"))


def entries(value: Any) -> int:
    """Return the number of entries in nested containers."""
    if isinstance(value, Mapping):
        return len(value) + sum(map(entries, value.values()))
    if isinstance(value, set | frozenset | list | tuple | deque):
        return len(value) + sum(map(entries, value))
    return 0


class Year:
    """The parts of control and of one ingress, with a clock that is moved."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unix, self.monotonic = time.time(), time.monotonic()
        monkeypatch.setattr(time, "time", lambda: self.unix)
        monkeypatch.setattr(time, "monotonic", lambda: self.monotonic)
        monkeypatch.setattr(serve_apps_module, "_delete", lambda name: None)
        monkeypatch.setattr(ServeApps, "_run", lambda *args: None)
        monkeypatch.setattr(hung_replicas, "kill_serve_replica", lambda actor: False)
        self.database = Database(f"sqlite:///{home / 'test.db'}")
        self.usage, self.keys = Usage(self.database), Keys(self.database)
        self.registry, self.models, self.operations = Registry(), Models(), Operations()
        self.serve_apps = ServeApps(Settings(home=home))
        self.cold_starts = ColdStarts(self.database, CollectorRegistry())
        self.autoscaler = Autoscaler(
            models=self.models,
            serve_apps=self.serve_apps,
            registry=self.registry,
            cold_starts=self.cold_starts,
            keys=self.keys,
            nodes=lambda: [Node("n", "n", {"CPU": 1}, {"CPU": 1})],
            head=lambda: "n",
            control=("h", 1),
        )
        self.hung = HungReplicas(self.registry, self.autoscaler.replica_hung)
        self.metrics = ControlMetrics(CollectorRegistry(), self.autoscaler, self.registry, self.cold_starts)
        self.adapters = AdaptersCatalog(
            self.models, WeightsCatalog(self.models), self.database, self.autoscaler.set_adapters
        )
        self.revisions = AdapterRevisions(self._resolve)
        self.limiter, self.deaths = Limiter(), EngineDeaths()
        self.queue = RequestQueue(60, lambda: None)
        self.autoscaler.activate(factories.deployed(factories.spec("stays", lora=LORA)))

    async def _resolve(self, model: str, name: str, revision: str) -> Adapter:
        if revision == "missing":
            raise NotFound("no such revision")
        return Adapter(name=name, pin=PIN)

    def wait(self, seconds: float) -> None:
        """Move the clock."""
        self.unix += seconds
        self.monotonic += seconds

    async def step(self, number: int) -> None:
        """Deploy a model with a package and an adapter, create a key, use them, then delete all."""
        name, adapter, digest = f"m{number}", f"a{number}", f"{number:064}"
        self.database.put_package(digest, b"code")
        spec = factories.spec(name, lora=LORA, rpm=1000).model_copy(
            update={"code": Code(package=digest, file="app.py", cls="A")}
        )
        row = factories.deployed(spec)
        operation = self.operations.start("deploy", self._deploy, app="app")
        assert operation.task
        await operation.task
        self.database.put_version(row, active=True)
        await self.serve_apps.set_target(row, 1)
        self.autoscaler.activate(row)
        key = KeyInfo(name=f"k{number}", rpm=1000)
        self.keys.create(key)
        assert row.spec.lora
        for model in (name, "stays"):
            self.adapters._update(model, ModelAdapters(row.spec.lora, {adapter: Adapter(name=adapter, pin=PIN)}))
        await self._requests(number, key)
        self.keys.revoke(key.name)
        await self.serve_apps.delete(name, 1)
        self.database.remove([name])
        self.autoscaler.remove(name)
        self.revisions.forget(name)
        # The replica of the deleted model still drains, and reports.
        self.registry.report(factories.report(model=name, replica=f"r{number}", version=1), self.monotonic)
        self.registry.report_traffic("i", {name: Traffic(0, 1)}, self.monotonic)
        self.wait(10)
        await self.autoscaler.tick(self.monotonic)
        await self.hung.check(self.monotonic)
        self.usage.forget(f"r{number}")
        list(self.adapters._due())
        self.usage.forget_unused(self.monotonic)
        await self.usage.flush()

    async def _deploy(self, operation: Operation) -> None:
        await operation.emit("step", "one", "proving")

    async def _requests(self, number: int, key: KeyInfo) -> None:
        """Send requests to the model of that number and to one that stays."""
        model, adapter = f"m{number}", f"a{number}"
        for count in range(4):
            self.wait(STEP_S / 4)
            for name, replica in ((model, f"r{number}"), ("stays", f"s{number}")):
                target = route(1, name=name, names=(name,), rpm=1000)
                self.queue.update(Table(models={name: target}, names={name: name}))
                with self.limiter.acquire([*key_limits(key), *model_limits(target)], self.monotonic):
                    caller = Caller(key.name, adapter_label=adapter)
                    claim = await self.queue.claim(name, WaitLimit(0, 1), caller=caller)
                    self.queue.release(claim)
                self.deaths.add(request_digest(name, 1, "/", str(number).encode()), replica, self.monotonic)
                report = factories.report(
                    model=name,
                    replica=replica,
                    usage=((key.name, f"{name}:{adapter}", count, count, count, 0),),
                    paces=(((adapter, *[float(count)] * 19), None),),
                )
                self.registry.report(report, self.monotonic)
                self.usage.report(report, self.monotonic)
                self.metrics.report(report)
                self.adapters.report(report, self.unix)
            for revision in ("main", "missing"):
                await self.revisions.find(model, f"{adapter}@{revision}", 60)
            self.cold_starts.begin(model, 1, self.unix)
            self.database.put_cold_start(
                ColdStart(model=model, version=1, node="n", forked=False, asked=self.unix, parts={})
            )
            local = {model_subject(model): LocalUsage(1, 0)}
            self.registry.report_traffic("i", self.queue.traffic(), self.monotonic, local)
            self.limiter.usage(self.monotonic)
            self.usage.forget(f"s{number}")

    def sizes(self) -> dict[str, int]:
        """Return the number of entries of each container of the parts, and of the rows of each table."""
        parts: tuple[Any, ...] = (
            *(self.usage, self.keys, self.registry, self.models, self.operations, self.serve_apps, self.cold_starts),
            *(self.autoscaler, self.metrics._paces, self.adapters, self.revisions),
            *(self.limiter, self.deaths, self.queue, self.queue.in_flight),
        )
        sizes = {
            f"{type(part).__name__}.{name}": entries(value) for part in parts for name, value in vars(part).items()
        }
        with self.database.session() as session:
            for table in Base.metadata.sorted_tables:
                sizes[table.name] = session.scalar(select(func.count()).select_from(table)) or 0
        return sizes


# Caches with a limit, and the series of metrics, which last until control restarts.
BOUNDED = {"Paces._sums", "AdapterRevisions._cached", "AdapterRevisions._failed"}


async def test_nothing_grows_in_a_year(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    year = Year(tmp_path, monkeypatch)
    early: dict[str, int] = {}
    for number in range(END):
        await year.step(number)
        if number == EARLY:
            early = year.sizes()
    late = year.sizes()
    grown = {name: (early[name], size) for name, size in late.items() if size > early[name]}
    assert not grown.keys() - HISTORY - BOUNDED, grown
    assert late["models"] == late["versions"] == late["keys"] == 0
    year.database.close()
