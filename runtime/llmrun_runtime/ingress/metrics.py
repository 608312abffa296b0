"""What the ingress counts for Prometheus, and its log, of each request; at `/metrics` with control's and the engines'.

Engines' metrics come with the labels `llmrun_model` and `replica` beside their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import aiohttp
import ray
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from llmrun_runtime.engines.base import TOKEN_HEADER
from llmrun_runtime.ingress.waiting import Waiting
from llmrun_runtime.link.client import Links
from llmrun_runtime.table import ReplicaRoute

log = logging.getLogger("llmrun.ingress")
GATHER_TIMEOUT_S = 3
# Seconds: a first token takes milliseconds when a model is hot, minutes when it wakes; a long answer an hour.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


@dataclass
class Request:
    """One inference request, for metrics and the log. `status` is 0 while nothing has been answered."""

    id: str
    model: str = ""
    key: str = ""
    path: str = ""
    status: int = 0
    began: float = field(default_factory=time.monotonic)
    first_byte: float = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    """For its answer: `x-ratelimit-*`."""

    def __str__(self) -> str:
        first = f" first byte {self.first_byte - self.began:.3f} s," if self.first_byte else ""
        took = time.monotonic() - self.began
        who = f" key {self.key}" if self.key else ""
        return f"{self.id}{who} {self.model or '-'} {self.path} {self.status or 'left'},{first} {took:.3f} s"


class Metrics:
    """The ingress's own, and where they are put together with everybody's.

    `others`: of the other ingresses by name, what they would say of themselves.
    """

    def __init__(
        self, name: str, waiting: Waiting, others: Callable[[], Mapping[str, Awaitable[str]]] = lambda: {}
    ) -> None:
        self._name = name
        self._waiting = waiting
        self._others = others
        self._registry = CollectorRegistry()
        self._registry.register(_Traffic(waiting))
        self._requests = Counter(
            "llmrun_requests", "Inference requests that have ended.", ("model", "status"), registry=self._registry
        )
        self._first_byte = Histogram(
            "llmrun_time_to_first_byte_seconds",
            "From a request's arrival to the first byte of its answer, waiting included.",
            ("model",),
            registry=self._registry,
            buckets=BUCKETS,
        )
        self._whole = Histogram(
            "llmrun_request_seconds",
            "From a request's arrival to its end.",
            ("model",),
            registry=self._registry,
            buckets=BUCKETS,
        )

    def ended(self, request: Request) -> None:
        """Count a request. A caller who left before its answer has the status 499, as nginx has it; the model of a
        request that was refused before it was known is "".
        """
        self._requests.labels(request.model, str(request.status or 499)).inc()
        self._whole.labels(request.model).observe(time.monotonic() - request.began)
        if request.first_byte:
            self._first_byte.labels(request.model).observe(request.first_byte - request.began)

    def own(self) -> str:
        """This ingress's, in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    async def gather(self, session: aiohttp.ClientSession, links: Links) -> bytes:
        """All metrics in Prometheus' text format; those of who does not answer in time are left out."""
        table = self._waiting.table
        host, port = table.control
        shown = [model for model in table.models.values() if model.log_engine_metrics]
        replicas = [(model.name, replica) for model in shown for replica in model.replicas]
        others = self._others()
        control, *texts = await asyncio.gather(
            _in_time("control", _from_control(session, f"http://{host}:{port}/metrics")),
            *(_in_time(name, text) for name, text in others.items()),
            *(_in_time(f"{model} {replica.id[:12]}", _from_engine(links, replica)) for model, replica in replicas),
        )
        labels = [{"ingress": name} for name in (self._name, *others)]
        labels += [{"llmrun_model": model, "replica": replica.id[:12]} for model, replica in replicas]
        merged = CollectorRegistry()
        merged.register(_Merged(zip((self.own(), *texts), labels, strict=True)))
        return control.encode() + generate_latest(merged)


class _Traffic(Collector):
    """What waits and what is in flight now."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("llmrun_requests_waiting", "Requests without a replica yet.", labels=("model",))
        flying = GaugeMetricFamily("llmrun_requests_in_flight", "Requests at replicas.", labels=("model",))
        traffic = self._waiting.traffic()
        for model in self._waiting.table.models:
            waiting.add_metric((model,), traffic[model].waiting if model in traffic else 0)
            flying.add_metric((model,), traffic[model].in_flight if model in traffic else 0)
        yield waiting
        yield flying


class _Merged(Collector):
    """Several texts as one, with more labels for each; one family of each name."""

    def __init__(self, texts: Iterable[tuple[str, Mapping[str, str]]]) -> None:
        self._texts = list(texts)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for text, more in self._texts:
            for family in text_string_to_metric_families(text):
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    known.samples.append(sample._replace(labels={**sample.labels, **more}))
        yield from families.values()


async def _in_time(who: str, text: Awaitable[str]) -> str:
    try:
        async with asyncio.timeout(GATHER_TIMEOUT_S):
            return await text
    except (aiohttp.ClientError, ray.exceptions.RayError, OSError, TimeoutError, ValueError) as error:
        log.warning("no metrics from %s: %s", who, type(error).__name__)
        return ""


async def _from_control(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as answer:
        return await answer.text() if answer.status == 200 else ""


async def _from_engine(links: Links, replica: ReplicaRoute) -> str:
    link = await links.get(replica.host, replica.port)
    with link.ask("GET", "/metrics", b"", [(TOKEN_HEADER, replica.token)]) as answer:
        await link.finish(answer, b"")
        await answer.started()
        text = bytearray()
        while piece := await answer.read():
            text += piece
    return text.decode() if answer.status == 200 else ""
