"""`GET /metrics`: the ingress's own metrics, merged with those of control, the engines and the other ingresses.

Engines' metrics get the labels `model` and `replica` in addition to their own. The docs list all names.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

import aiohttp
import ray
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmrun_runtime.ingress.endpoints.metrics_merge import merge
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.ingress.request_record import RequestRecord
from llmrun_runtime.link.client import Links
from llmrun_runtime.metric_labels import AdapterLabels
from llmrun_runtime.wire.headers import TOKEN_HEADER, metrics_credential
from llmrun_runtime.wire.routing_table import ReplicaRoute

log = logging.getLogger("llmrun.ingress")
GATHER_TIMEOUT_S = 3
# Seconds: a first token takes milliseconds from a hot model and minutes from a cold one; a long response takes an hour.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
# Their streams start with an event before the first token.
NO_FIRST_TOKEN = frozenset({"/v1/responses"})


class IngressMetrics:
    """This ingress's metrics, and the page that merges all sources.

    `others`: returns the metrics of the other ingresses, by name. `timeout`: seconds to wait for each source.
    """

    def __init__(
        self,
        name: str,
        queue: RequestQueue,
        others: Callable[[], Mapping[str, Awaitable[str]]] = lambda: {},
        timeout: float = GATHER_TIMEOUT_S,
    ) -> None:
        self._name = name
        self._queue = queue
        self._others = others
        self._timeout = timeout
        self.adapter = AdapterLabels()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "llmrun_requests",
            "Completed inference requests.",
            ("model", "adapter", "status"),
            registry=self._registry,
        )
        self._first_byte = self._histogram(
            "llmrun_time_to_first_byte_seconds",
            "Time from a request's arrival to the first byte of its response, including queueing.",
        )
        self._first_token = self._histogram(
            "llmrun_time_to_first_token_seconds",
            "Time from a request's arrival to the first event of its streamed response, including queueing.",
            "adapter",
        )
        self._duration = self._histogram("llmrun_request_seconds", "Time from a request's arrival to its end.")

        self._errors = Counter(
            "llmrun_ingress_errors",
            "Unexpected exceptions in the ingress, by task.",
            ("task",),
            registry=self._registry,
        )

    def count_error(self, task: str) -> None:
        """Count an unexpected exception of one of the ingress's tasks."""
        self._errors.labels(task).inc()

    def _histogram(self, name: str, text: str, *more: str) -> Histogram:
        return Histogram(name, text, ("model", *more), registry=self._registry, buckets=BUCKETS)

    def ended(self, request: RequestRecord) -> None:
        """Count a completed request.

        Its status is 499, like nginx's, if the client left before the response; its model is "" if it was rejected
        before the model was known.
        """
        self._requests.labels(request.model, request.adapter, str(request.status or 499)).inc()
        self._duration.labels(request.model).observe(time.monotonic() - request.began)
        if request.first_byte:
            first = request.first_byte - request.began
            self._first_byte.labels(request.model).observe(first)
            if request.streamed and request.path not in NO_FIRST_TOKEN:
                self._first_token.labels(request.model, request.adapter).observe(first)

    async def own(self) -> str:
        """Return this ingress's metrics in Prometheus' text format."""
        models = list(self._queue.table.models)
        now = _Gauges(models, *self._queue.by_adapter())

        def text() -> str:
            self._errors.labels("routing table")
            for model in models:  # start at 0, so that the first request is an increase
                self._requests.labels(model, "", "200")
                self._first_token.labels(model, "")
            return (generate_latest(self._registry) + generate_latest(now)).decode()

        return await asyncio.to_thread(text)

    async def gather(self, session: aiohttp.ClientSession, links: Links) -> bytes:
        """Return all metrics in Prometheus' text format, without sources that do not respond in time."""
        table = self._queue.table
        shown = [model for model in table.models.values() if model.log_engine_metrics]
        replicas = [(model.name, replica) for model in shown for replica in model.replicas]
        others = self._others()
        texts = await asyncio.gather(
            self.own(),
            self._in_time("control", _from_control(session, table.control, table.admin)),
            *(self._in_time(name, text) for name, text in others.items()),
            *(self._in_time(f"{model} {replica.id[:12]}", _from_engine(links, replica)) for model, replica in replicas),
        )
        labels: list[dict[str, str]] = [{"ingress": self._name}, {}, *({"ingress": name} for name in others)]
        labels += [{"model": model, "replica": replica.id[:12]} for model, replica in replicas]
        return (await asyncio.to_thread(merge, list(zip(texts, labels, strict=True)))).encode()

    async def _in_time(self, source: str, text: Awaitable[str]) -> str:
        try:
            async with asyncio.timeout(self._timeout):
                return await text
        except (aiohttp.ClientError, ray.exceptions.RayError, OSError, TimeoutError, ValueError) as error:
            log.warning("no metrics from %s: %s", source, type(error).__name__)
            return ""


class _Gauges(Collector):
    """The numbers of waiting and in-flight requests, by model and adapter."""

    def __init__(
        self,
        models: Iterable[str],
        waiting: Mapping[tuple[str, str], int],
        in_flight: Mapping[tuple[str, str], int],
    ) -> None:
        self._zeros = {(model, ""): 0 for model in models}
        self._waiting = waiting
        self._in_flight = in_flight

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("llmrun_requests_waiting", "Requests waiting for a replica.", self._waiting)
        yield self._gauge("llmrun_requests_in_flight", "Requests in progress at replicas.", self._in_flight)

    def _gauge(self, name: str, text: str, counts: Mapping[tuple[str, str], int]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("model", "adapter"))
        for labels, count in {**self._zeros, **counts}.items():
            family.add_metric(labels, count)
        return family


async def _from_control(session: aiohttp.ClientSession, control: tuple[str, int], admin_digest: str) -> str:
    host, port = control
    headers = {"authorization": metrics_credential(admin_digest)}
    async with session.get(f"http://{host}:{port}/metrics", headers=headers) as response:
        return await response.text() if response.status == 200 else ""


async def _from_engine(links: Links, replica: ReplicaRoute) -> str:
    link = await links.get(replica.host, replica.port)
    with link.request("GET", "/metrics", b"", [(TOKEN_HEADER, replica.token)]) as exchange:
        await exchange.send_body(b"")
        await exchange.wait_headers()
        text = bytearray()
        while chunk := await exchange.read():
            text += chunk
    return text.decode() if exchange.status == 200 else ""
