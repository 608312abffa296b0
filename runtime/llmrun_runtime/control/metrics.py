"""Control's metrics for Prometheus: states and replicas, tokens, time per output token, wakes, weights on nodes.

Tokens and times come with the replicas' reports and are added up here, so that the sums outlive replicas.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import get_args

import ray
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from llmrun.wire import ModelStatus, State
from llmrun_runtime.actors import NAMESPACE
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.metric_labels import AdapterLabels
from llmrun_runtime.node.agent import agent_name
from llmrun_runtime.placement import Node
from llmrun_runtime.ray_nodes import real_nodes
from llmrun_runtime.weights.node_weights import CacheInfo
from llmrun_runtime.wire.reports import ReplicaReport
from llmrun_runtime.wire.usage import PACE_BUCKETS

log = logging.getLogger("llmrun.control")
# For an agent that does not respond in time, its last response is shown. The ingress waits for control's page for 3 s.
AGENT_TIMEOUT_S = 1.5
Group = tuple[str, str]
"""Model, adapter."""
Pace = list[float]
"""A `wire.usage.PaceRow` without the adapter."""


class ControlMetrics:
    """Control's metrics page. `metrics` is the Prometheus registry, in which other parts count too."""

    def __init__(
        self, metrics: CollectorRegistry, autoscaler: Autoscaler, registry: Registry, cold_starts: ColdStarts
    ) -> None:
        self._metrics = metrics
        self._autoscaler = autoscaler
        self._registry = registry
        self._cold_starts = cold_starts
        self._adapter_label = AdapterLabels()
        self._paces = Paces(self._adapter_label)
        self._caches: dict[str, tuple[str, CacheInfo]] = {}
        """By node id, the last response of its agent."""
        self._errors = Counter(
            "llmrun_control_errors", "Unexpected exceptions in control, by task.", ("task",), registry=metrics
        )
        self._prompt = self._counter("llmrun_prompt_tokens", "Prompt tokens.")
        self._completion = self._counter("llmrun_completion_tokens", "Completion tokens.")
        self._cached = self._counter("llmrun_cached_prompt_tokens", "Prompt tokens that engines had cached.")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("model", "adapter"), registry=self._metrics)

    def count_error(self, task: str) -> None:
        """Count an unexpected exception of one of control's tasks."""
        self._errors.labels(task).inc()

    def count_tokens(self, model: str, adapter: str, counts: Sequence[int]) -> None:
        """Count tokens; see `Usage.on_new`. `adapter` is the engine's name for it, `model:adapter`."""
        labels = (model, self._adapter_label(model, adapter_name(adapter)))
        _, prompt, completion, cached = counts
        self._prompt.labels(*labels).inc(prompt)
        self._completion.labels(*labels).inc(completion)
        self._cached.labels(*labels).inc(cached)

    def report(self, report: ReplicaReport) -> None:
        """Add a replica's times per output token."""
        if self._paces.report(report):
            self._paces.keep(self._registry.replicas)

    async def page(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        await self._update_caches()
        statuses, targets = self._autoscaler.statuses(), self._autoscaler.targets()
        models = [status.name for status in statuses]
        current = _Families(
            [*model_families(statuses, targets), *node_families(self._caches.values()), self._paces.family(models)]
        )

        def text() -> bytes:
            self._errors.labels("autoscaler")
            self._cold_starts.create_series(models)
            for counter, model in itertools.product((self._prompt, self._completion, self._cached), models):
                counter.labels(model, "")
            return generate_latest(self._metrics) + generate_latest(current)

        return await asyncio.to_thread(text)

    async def _update_caches(self) -> None:
        """Ask the running node agents. Starts none: an agent keeps its node from being removed."""

        async def ask(node: Node) -> CacheInfo | None:
            try:
                agent = await asyncio.to_thread(ray.get_actor, agent_name(node.id), namespace=NAMESPACE)
                info: CacheInfo = await agent.cache_info.remote()
            except (ray.exceptions.RayError, ValueError) as error:
                log.info("no weights metrics from node %s: %s", node.host, type(error).__name__)
                return None
            return info

        nodes = await asyncio.to_thread(real_nodes)
        tasks = {node.id: asyncio.ensure_future(ask(node)) for node in nodes}
        done, late = await asyncio.wait(tasks.values(), timeout=AGENT_TIMEOUT_S)
        for task in late:
            task.cancel()
        replies = ((node, tasks[node.id].result() if tasks[node.id] in done else None) for node in nodes)
        caches = {node.id: (node.host, info) if info else self._caches.get(node.id) for node, info in replies}
        self._caches = {node: cache for node, cache in caches.items() if cache}


class Paces:
    """Times per output token by model and adapter, summed over all replicas that have reported to this control."""

    def __init__(self, adapter_label: Callable[[str, str], str]) -> None:
        self._adapter_label = adapter_label
        self._counted: dict[str, dict[str, Sequence[float]]] = {}
        """By replica and adapter, the numbers already added up."""
        self._sums: dict[Group, Pace] = {}

    def report(self, report: ReplicaReport) -> bool:
        """Add the new part of a replica's numbers. Return whether it is the replica's first report.

        For a replica that this control has not seen before, the report contains what an earlier control received.
        """
        is_new = report.id not in self._counted
        counted = self._counted.setdefault(report.id, {})
        for (adapter, *numbers), acknowledged in report.paces:
            previous = counted.get(adapter, acknowledged[1:] if acknowledged else _zeros())
            if any(number < old for number, old in zip(numbers, previous, strict=True)):  # it has a new engine
                previous = _zeros()
            counted[adapter] = numbers
            group = (report.model, self._adapter_label(report.model, adapter_name(adapter)))
            sums = self._sums.setdefault(group, _zeros())
            for index, (number, old) in enumerate(zip(numbers, previous, strict=True)):
                sums[index] += number - old
        return is_new

    def keep(self, replicas: Iterable[str]) -> None:
        """Forget all other replicas."""
        self._counted = {replica: self._counted[replica] for replica in replicas if replica in self._counted}

    def family(self, models: Iterable[str]) -> Metric:
        """Return the histogram, with zeros for `models` without numbers."""
        family = HistogramMetricFamily(
            "llmrun_time_per_output_token_seconds",
            "Per stream: time from the first token to the last, divided by the tokens after the first.",
            labels=("model", "adapter"),
        )
        bounds = [*map(str, PACE_BUCKETS), "+Inf"]
        for labels, (total, *counts) in {**{(model, ""): _zeros() for model in models}, **self._sums}.items():
            buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
            family.add_metric(labels, buckets, total)
        return family


def adapter_name(adapter: str) -> str:
    """Return the adapter's own name from `model:adapter`."""
    return adapter.partition(":")[2] or adapter


def _zeros() -> Pace:
    return [0.0] * (len(PACE_BUCKETS) + 2)


def model_families(statuses: Iterable[ModelStatus], targets: Mapping[str, int]) -> Iterator[Metric]:
    """Yield each model's state, ready replicas and target."""
    state = GaugeMetricFamily("llmrun_model_state", "1 for the model's current state.", labels=("model", "state"))
    target = GaugeMetricFamily("llmrun_replicas_target", "The target number of replicas.", labels=("model",))
    ready = GaugeMetricFamily("llmrun_replicas_ready", "Replicas that serve requests.", labels=("model",))
    for status in statuses:
        for name in get_args(State):
            state.add_metric((status.name, name), name == status.state)
        target.add_metric((status.name,), targets.get(status.name, 0))
        ready.add_metric((status.name,), status.replicas)
    yield from (state, target, ready)


def node_families(caches: Iterable[tuple[str, CacheInfo]]) -> Iterator[Metric]:
    """Yield the metrics of the weights caches, by node address. Ray nodes with one address share a cache."""
    size = GaugeMetricFamily("llmrun_weights_cache_bytes", "Size of the node's weights cache.", labels=("node",))
    needed = CounterMetricFamily(
        "llmrun_weights_needed",
        "Pins that a replica needed on the node: found there, fetched (`brought`), or failed.",
        labels=("node", "outcome"),
    )
    hosts: dict[str, list[CacheInfo]] = {}
    for host, info in caches:
        hosts.setdefault(host, []).append(info)
    for host, rows in hosts.items():
        size.add_metric((host,), max(row.bytes for row in rows))
        needed.add_metric((host, "found"), sum(row.found for row in rows))
        needed.add_metric((host, "brought"), sum(row.fetched for row in rows))
        needed.add_metric((host, "failed"), sum(row.failed for row in rows))
    yield from (size, needed)


class _Families(Collector):
    """Families that are computed already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
