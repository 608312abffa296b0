"""Control's page for Prometheus: states and replicas, tokens, time per output token, wakes, weights on nodes.

Tokens and times come with replicas' reports and are added up here, so that they grow on when replicas end.
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
# An agent that does not answer in time is taken to have what it had; the ingress waits for all of this for 3 s.
AGENT_S = 1.5
Where = tuple[str, str]
"""Model, adapter."""
Pace = list[float]
"""As `meter.PaceRow`, without the adapter."""


class ControlMetrics:
    """What of control's knowledge Prometheus asks for; `registry` has what others count."""

    def __init__(self, registry: CollectorRegistry, scaling: Autoscaler, reports: Registry, starts: ColdStarts) -> None:
        self._registry = registry
        self._scaling = scaling
        self._reports = reports
        self._starts = starts
        self._adapter = AdapterLabels()
        self._paces = Paces(self._adapter)
        self._facts: dict[str, CacheInfo] = {}
        self._prompt = self._counter("llmrun_prompt_tokens", "Tokens of prompts.")
        self._completion = self._counter("llmrun_completion_tokens", "Tokens of answers.")
        self._cached = self._counter("llmrun_cached_prompt_tokens", "Tokens of prompts that engines had cached.")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("model", "adapter"), registry=self._registry)

    def used(self, model: str, adapter: str, counts: Sequence[int]) -> None:
        """See `Usage.on_new`; `adapter` as engines call it, `model:adapter`."""
        labels = (model, self._adapter(model, plain(adapter)))
        _, prompt, completion, cached = counts
        self._prompt.labels(*labels).inc(prompt)
        self._completion.labels(*labels).inc(completion)
        self._cached.labels(*labels).inc(cached)

    def report(self, report: ReplicaReport) -> None:
        """Take what a replica says of the times of its tokens."""
        self._paces.report(report)

    async def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        await self._look_at_nodes()
        self._paces.forget(self._reports.replicas)
        statuses, targets = self._scaling.statuses(), self._scaling.targets()
        models = [status.name for status in statuses]
        now = _Given([*model_families(statuses, targets), *node_families(self._facts), self._paces.family(models)])

        def text() -> bytes:
            self._starts.known(models)
            for counter, model in itertools.product((self._prompt, self._completion, self._cached), models):
                counter.labels(model, "")
            return generate_latest(self._registry) + generate_latest(now)

        return await asyncio.to_thread(text)

    async def _look_at_nodes(self) -> None:
        """Ask the agents that there are; none is started for this, so that nodes may leave."""

        async def ask(node: Node) -> CacheInfo | None:
            try:
                agent = await asyncio.to_thread(ray.get_actor, agent_name(node.id), namespace=NAMESPACE)
                found: CacheInfo = await agent.cache_facts.remote()
            except (ray.exceptions.RayError, ValueError) as error:
                log.info("node %s says nothing of its weights: %s", node.host, type(error).__name__)
                return None
            return found

        nodes = await asyncio.to_thread(real_nodes)
        asked = {node.host: asyncio.ensure_future(ask(node)) for node in nodes}
        done, late = await asyncio.wait(asked.values(), timeout=AGENT_S)
        for task in late:
            task.cancel()
        said = {host: task.result() if task in done else None for host, task in asked.items()}
        known = {host: facts or self._facts.get(host) for host, facts in said.items()}
        self._facts = {host: facts for host, facts in known.items() if facts}


class Paces:
    """Times per output token, by model and adapter, of all replicas that have ever reported to this control."""

    def __init__(self, adapter: Callable[[str, str], str]) -> None:
        self._adapter = adapter
        self._seen: dict[str, dict[str, Sequence[float]]] = {}
        self._sums: dict[Where, Pace] = {}

    def report(self, report: ReplicaReport) -> None:
        """Add what is new. Of a replica that this control has not seen before, it knows itself what it has told."""
        seen = self._seen.setdefault(report.id, {})
        for (adapter, *numbers), told in report.paces:
            before = seen.get(adapter, told[1:] if told else _nothing())
            if any(number < old for number, old in zip(numbers, before, strict=True)):  # it has a new engine
                before = _nothing()
            seen[adapter] = numbers
            sums = self._sums.setdefault((report.model, self._adapter(report.model, plain(adapter))), _nothing())
            for place, (number, old) in enumerate(zip(numbers, before, strict=True)):
                sums[place] += number - old

    def forget(self, living: Iterable[str]) -> None:
        """All other replicas are gone."""
        self._seen = {replica: self._seen[replica] for replica in living if replica in self._seen}

    def family(self, models: Iterable[str]) -> Metric:
        """The histogram; of `models` without any, one of zeros."""
        family = HistogramMetricFamily(
            "llmrun_time_per_output_token_seconds",
            "Of each streamed answer, the time from its first token to its last, by the tokens after the first.",
            labels=("model", "adapter"),
        )
        bounds = [*map(str, PACE_BUCKETS), "+Inf"]
        for labels, (total, *counts) in {**{(model, ""): _nothing() for model in models}, **self._sums}.items():
            buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
            family.add_metric(labels, buckets, total)
        return family


def plain(adapter: str) -> str:
    """An adapter's own name, of `model:adapter`."""
    return adapter.partition(":")[2] or adapter


def _nothing() -> Pace:
    return [0.0] * (len(PACE_BUCKETS) + 2)


def model_families(statuses: Iterable[ModelStatus], targets: Mapping[str, int]) -> Iterator[Metric]:
    """What state each model is in, and how many replicas it has and should have."""
    state = GaugeMetricFamily("llmrun_model_state", "1 for the state that it is in.", labels=("model", "state"))
    target = GaugeMetricFamily("llmrun_replicas_target", "Replicas that there should be.", labels=("model",))
    ready = GaugeMetricFamily("llmrun_replicas_ready", "Replicas that answer.", labels=("model",))
    for status in statuses:
        for name in get_args(State):
            state.add_metric((status.name, name), name == status.state)
        target.add_metric((status.name,), targets.get(status.name, 0))
        ready.add_metric((status.name,), status.replicas)
    yield from (state, target, ready)


def node_families(facts: Mapping[str, CacheInfo]) -> Iterator[Metric]:
    """The weights on each node, by its address."""
    held = GaugeMetricFamily("llmrun_weights_cache_bytes", "Weights that llmrun keeps on the node.", labels=("node",))
    needed = CounterMetricFamily(
        "llmrun_weights_needed",
        "Pins that were needed on the node: found there, brought, or failed to come.",
        labels=("node", "outcome"),
    )
    for node, row in facts.items():
        held.add_metric((node,), row.bytes)
        for outcome, count in (("found", row.found), ("brought", row.brought), ("failed", row.failed)):
            needed.add_metric((node, outcome), count)
    yield from (held, needed)


class _Given(Collector):
    """Families that there are already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
