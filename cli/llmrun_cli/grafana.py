"""The Grafana dashboard: which panels it has, and what each asks of Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DATASOURCE = "llmrun-prometheus"
WIDTH, WIDE, HEIGHT = 24, 8, 8
M = '{model=~"$model"}'
HOT = '{model=~"$model",status="200"}'
RATE = "[$__rate_interval]"
# What happens now and then is counted over all that is shown: over a minute there would mostly be nothing.
SHOWN = "[$__range]"
STATES = {"cold": (0, "blue"), "waking": (1, "yellow"), "hot": (2, "green"), "draining": (3, "purple")}
STATES |= {"failed": (4, "red")}


@dataclass(frozen=True)
class Panel:
    """Title, unit as Grafana has it, queries with their legends, and what is worth saying of them."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str = ""
    kind: str = "timeseries"
    wide: int = WIDE


def _quantiles(metric: str, *quantiles: float) -> tuple[tuple[str, str], ...]:
    buckets = f"sum by (model, le) (rate({metric}_bucket{M}{RATE}))"
    return tuple((f"histogram_quantile({q}, {buckets})", f"{{{{model}}}} p{100 * q:g}") for q in quantiles)


def _rate(metric: str, by: str = "model", labels: str = M) -> str:
    return f"sum by ({by}) (rate({metric}{labels}{RATE}))"


def _grown(metric: str, by: str = "model", labels: str = M) -> str:
    return f"sum by ({by}) (increase({metric}{labels}{SHOWN}))"


TOKENS = f"({_rate('llmrun_prompt_tokens_total')} + {_rate('llmrun_completion_tokens_total')})"
ROWS: dict[str, tuple[Panel, ...]] = {
    "Requests and tokens": (
        Panel(
            "Requests/s",
            "reqps",
            ((_rate("llmrun_requests_total", "model, status"), "{{model}} {{status}}"),),
            "Those that have ended. 499: the caller left.",
        ),
        Panel(
            "Tokens/s",
            "short",
            (
                (_rate("llmrun_prompt_tokens_total"), "{{model}} prompts"),
                (_rate("llmrun_completion_tokens_total"), "{{model}} answers"),
            ),
        ),
        Panel(
            "Peak tokens/s",
            "short",
            ((f"max_over_time({_rate('llmrun_completion_tokens_total')}[$__range:])", "{{model}}"),),
            "The most tokens of answers a second in the time shown.",
            "stat",
        ),
        Panel(
            "Tokens per request",
            "short",
            ((f"{TOKENS} / ({_rate('llmrun_requests_total', labels=HOT)} > 0)", "{{model}}"),),
            "Of prompts and answers together, for each request that was answered.",
        ),
        Panel(
            "Input to output",
            "short",
            (
                (
                    f"{_rate('llmrun_prompt_tokens_total')} / ({_rate('llmrun_completion_tokens_total')} > 0)",
                    "{{model}}",
                ),
            ),
            "Tokens of prompts for each token of an answer.",
        ),
        Panel(
            "Requests in the time shown",
            "short",
            ((_grown("llmrun_requests_total"), "{{model}}"),),
            kind="bargauge",
        ),
        Panel(
            "Tokens in the time shown",
            "short",
            (
                (_grown("llmrun_prompt_tokens_total"), "{{model}} prompts"),
                (_grown("llmrun_completion_tokens_total"), "{{model}} answers"),
            ),
            kind="bargauge",
        ),
        Panel(
            "Requests/s by adapter",
            "reqps",
            (
                (
                    _rate("llmrun_requests_total", "model, adapter", '{model=~"$model",adapter!=""}'),
                    "{{model}}:{{adapter}}",
                ),
            ),
        ),
        Panel(
            "Tokens/s by adapter",
            "short",
            (
                (
                    _rate("llmrun_completion_tokens_total", "model, adapter", '{model=~"$model",adapter!=""}'),
                    "{{model}}:{{adapter}}",
                ),
            ),
            "Of answers.",
        ),
    ),
    "Latency": (
        Panel(
            "Time to first token",
            "s",
            _quantiles("llmrun_time_to_first_token_seconds", 0.5, 0.9, 0.99),
            "Of streamed answers, from the request's arrival, waiting and waking included.",
        ),
        Panel(
            "Time per output token",
            "s",
            _quantiles("llmrun_time_per_output_token_seconds", 0.5, 0.9, 0.99),
            "Of streamed answers, after the first token, in the engine.",
        ),
        Panel("Whole request", "s", _quantiles("llmrun_request_seconds", 0.5, 0.9, 0.99)),
    ),
    "Queues and caches": (
        Panel(
            "Waiting",
            "short",
            ((f"sum by (model) (llmrun_requests_waiting{M})", "{{model}}"),),
            "Requests without a replica yet.",
        ),
        Panel(
            "In flight",
            "short",
            ((f"sum by (model) (llmrun_requests_in_flight{M})", "{{model}}"),),
            "Requests at replicas.",
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            ((f"max by (model, replica) (vllm:kv_cache_usage_perc{M})", "{{model}} {{replica}}"),),
            "vLLM's own; nothing while no replica runs, or with log_engine_metrics=False.",
        ),
        Panel(
            "Prompt tokens from the cache",
            "percentunit",
            (
                (
                    f"{_rate('llmrun_cached_prompt_tokens_total')} / ({_rate('llmrun_prompt_tokens_total')} > 0)",
                    "{{model}}",
                ),
            ),
            "The share of prompts that engines did not have to compute.",
        ),
        Panel("Weights on nodes", "bytes", (("max by (node) (llmrun_weights_cache_bytes)", "{{node}}"),)),
        Panel(
            "Weights needed",
            "short",
            (
                (
                    "sum by (node, outcome) (increase(llmrun_weights_needed_total[$__range]))",
                    "{{node}} {{outcome}}",
                ),
            ),
            "In the time shown: found on the node, brought there, or failed to come.",
            "bargauge",
        ),
    ),
    "Models": (
        Panel(
            "States",
            "short",
            (
                (
                    " + ".join(
                        f'{number} * max by (model) (llmrun_model_state{{model=~"$model",state="{state}"}})'
                        for state, (number, _) in STATES.items()
                    ),
                    "{{model}}",
                ),
            ),
            kind="state-timeline",
            wide=2 * WIDE,
        ),
        Panel(
            "Replicas",
            "short",
            (
                (f"sum by (model) (llmrun_replicas_ready{M})", "{{model}} ready"),
                (f"sum by (model) (llmrun_replicas_target{M})", "{{model}} target"),
            ),
        ),
        Panel(
            "Wakes",
            "short",
            ((_grown("llmrun_wakes_total", "model, outcome"), "{{model}} {{outcome}}"),),
            "In the time shown. withdrawn: nobody waited any more.",
            "bargauge",
        ),
        Panel(
            "From zero to the first token",
            "s",
            (
                (
                    f"{_grown('llmrun_cold_start_seconds_sum')} / ({_grown('llmrun_cold_start_seconds_count')} > 0)",
                    "{{model}}",
                ),
            ),
            "Mean of the cold starts in the time shown.",
            "bargauge",
        ),
        Panel(
            "Parts of cold starts",
            "s",
            (
                (
                    f"{_grown('llmrun_cold_start_part_seconds_sum', 'model, part')} / "
                    f"({_grown('llmrun_cold_start_part_seconds_count', 'model, part')} > 0)",
                    "{{model}} {{part}}",
                ),
            ),
            "Means of the cold starts in the time shown.",
            "bargauge",
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels: list[dict[str, Any]] = []
    at = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": at, "w": WIDTH, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place, "panels": []})
        across, at = 0, at + 1
        for panel in row:
            if across + panel.wide > WIDTH:
                across, at = 0, at + HEIGHT
            place = {"x": across, "y": at, "w": panel.wide, "h": HEIGHT}
            panels.append({"id": len(panels) + 1, "gridPos": place, "datasource": source, **_shown(panel)})
            across += panel.wide
        at += HEIGHT
    return {
        "uid": "llmrun",
        "title": "llmrun",
        "tags": ["llmrun"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _model_variable(source)]},
        "panels": panels,
    }


def _shown(panel: Panel) -> dict[str, Any]:
    over_time = panel.kind in ("timeseries", "state-timeline")
    defaults: dict[str, Any] = {"unit": panel.unit}
    options: dict[str, Any] = {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}}
    if panel.kind in ("timeseries", "bargauge"):
        defaults["min"] = 0
    if panel.kind == "state-timeline":
        names = {str(number): {"text": state, "color": color} for state, (number, color) in STATES.items()}
        defaults["mappings"] = [{"type": "value", "options": names}]
    if not over_time:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + n),
                "expr": expr,
                "legendFormat": legend,
                "range": over_time,
                "instant": not over_time,
            }
            for n, (expr, legend) in enumerate(panel.queries)
        ],
    }


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "llmrun", "value": DATASOURCE},
    }


def _model_variable(source: dict[str, str]) -> dict[str, Any]:
    query = "label_values(llmrun_model_state, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": source,
        "definition": query,
        "query": {"query": query, "refId": "model"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }
