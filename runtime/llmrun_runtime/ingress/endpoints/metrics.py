"""What the ingress counts for Prometheus, and its log, of each request; at `/metrics` with control's and the engines'.

Engines' metrics come with the labels `model` and `replica` beside their own. docs/metrics.md has all names.
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
from prometheus_client.registry import Collector

from llmrun_runtime.ingress.endpoints.metrics_merge import merge
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.link.client import Links
from llmrun_runtime.metric_labels import AdapterLabels
from llmrun_runtime.wire.headers import TOKEN_HEADER
from llmrun_runtime.wire.routing_table import ReplicaRoute

log = logging.getLogger("llmrun.ingress")
GATHER_TIMEOUT_S = 3
# Seconds: a first token takes milliseconds when a model is hot, minutes when it wakes; a long answer an hour.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
# Their streams begin with an event that there will be an answer.
ANNOUNCED = frozenset({"/v1/responses"})


@dataclass
class RequestRecord:
    """One inference request, for metrics and the log. `status` is 0 while nothing has been answered."""

    id: str
    model: str = ""
    adapter: str = ""
    """As metrics call it."""
    key: str = ""
    path: str = ""
    status: int = 0
    began: float = field(default_factory=time.monotonic)
    first_byte: float = 0
    streams: bool = False
    """Whether that was an event of an answer."""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    """For its answer: `x-ratelimit-*`."""

    def __str__(self) -> str:
        first = f" first byte {self.first_byte - self.began:.3f} s," if self.first_byte else ""
        took = time.monotonic() - self.began
        who = f" key {self.key}" if self.key else ""
        return f"{self.id}{who} {self.model or '-'} {self.path} {self.status or 'left'},{first} {took:.3f} s"


class IngressMetrics:
    """The ingress's own, and where they are put together with everybody's.

    `others`: of the other ingresses by name, what they would say of themselves.
    """

    def __init__(
        self, name: str, waiting: RequestQueue, others: Callable[[], Mapping[str, Awaitable[str]]] = lambda: {}
    ) -> None:
        self._name = name
        self._waiting = waiting
        self._others = others
        self.adapter = AdapterLabels()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "llmrun_requests",
            "Inference requests that have ended.",
            ("model", "adapter", "status"),
            registry=self._registry,
        )
        self._first_byte = self._histogram(
            "llmrun_time_to_first_byte_seconds",
            "From a request's arrival to the first byte of its answer, waiting included.",
        )
        self._first_token = self._histogram(
            "llmrun_time_to_first_token_seconds",
            "From a request's arrival to the first event of its streamed answer, waiting included.",
            "adapter",
        )
        self._whole = self._histogram("llmrun_request_seconds", "From a request's arrival to its end.")

    def _histogram(self, name: str, text: str, *more: str) -> Histogram:
        return Histogram(name, text, ("model", *more), registry=self._registry, buckets=BUCKETS)

    def ended(self, request: RequestRecord) -> None:
        """Count a request. A caller who left before its answer has the status 499, as nginx has it; the model of a
        request that was refused before it was known is "".
        """
        self._requests.labels(request.model, request.adapter, str(request.status or 499)).inc()
        self._whole.labels(request.model).observe(time.monotonic() - request.began)
        if request.first_byte:
            first = request.first_byte - request.began
            self._first_byte.labels(request.model).observe(first)
            if request.streams and request.path not in ANNOUNCED:
                self._first_token.labels(request.model, request.adapter).observe(first)

    async def own(self) -> str:
        """This ingress's, in Prometheus' text format."""
        models = list(self._waiting.table.models)
        now = _Now(models, *self._waiting.by_adapter())

        def text() -> str:
            for model in models:  # what has not happened yet is 0, or its first time would be no increase
                self._requests.labels(model, "", "200")
                self._first_token.labels(model, "")
            return (generate_latest(self._registry) + generate_latest(now)).decode()

        return await asyncio.to_thread(text)

    async def gather(self, session: aiohttp.ClientSession, links: Links) -> bytes:
        """All metrics in Prometheus' text format; those of who does not answer in time are left out."""
        table = self._waiting.table
        host, port = table.control
        shown = [model for model in table.models.values() if model.log_engine_metrics]
        replicas = [(model.name, replica) for model in shown for replica in model.replicas]
        others = self._others()
        texts = await asyncio.gather(
            self.own(),
            _in_time("control", _from_control(session, f"http://{host}:{port}/metrics")),
            *(_in_time(name, text) for name, text in others.items()),
            *(_in_time(f"{model} {replica.id[:12]}", _from_engine(links, replica)) for model, replica in replicas),
        )
        labels: list[dict[str, str]] = [{"ingress": self._name}, {}, *({"ingress": name} for name in others)]
        labels += [{"model": model, "replica": replica.id[:12]} for model, replica in replicas]
        return (await asyncio.to_thread(merge, list(zip(texts, labels, strict=True)))).encode()


class _Now(Collector):
    """What waited and what was in flight, by model and adapter."""

    def __init__(
        self,
        models: Iterable[str],
        waiting: Mapping[tuple[str, str], int],
        in_flight: Mapping[tuple[str, str], int],
    ) -> None:
        self._none = {(model, ""): 0 for model in models}
        self._waiting = waiting
        self._in_flight = in_flight

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("llmrun_requests_waiting", "Requests without a replica yet.", self._waiting)
        yield self._gauge("llmrun_requests_in_flight", "Requests at replicas.", self._in_flight)

    def _gauge(self, name: str, text: str, counts: Mapping[tuple[str, str], int]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("model", "adapter"))
        for labels, count in {**self._none, **counts}.items():
            family.add_metric(labels, count)
        return family


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
