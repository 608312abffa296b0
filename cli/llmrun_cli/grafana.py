"""The Grafana dashboard: its panels and their Prometheus queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DATASOURCE = "llmrun-prometheus"
GRID_WIDTH, PANEL_WIDTH, PANEL_HEIGHT = 24, 8, 8
MODEL = '{model=~"$model"}'
SUCCESSFUL = '{model=~"$model",status="200"}'
RATE = "[$__rate_interval]"
# Rare events are counted over the whole time range: per minute, most values would be 0.
TIME_RANGE = "[$__range]"
STATES = {"cold": (0, "blue"), "waking": (1, "yellow"), "hot": (2, "green"), "draining": (3, "purple")}
STATES |= {"failed": (4, "red")}


@dataclass(frozen=True)
class Panel:
    """A panel: title, Grafana unit, queries with their legends, description, type and width."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    description: str = ""
    kind: str = "timeseries"
    width: int = PANEL_WIDTH


def _quantiles(metric: str, *quantiles: float) -> tuple[tuple[str, str], ...]:
    buckets = f"sum by (model, le) (rate({metric}_bucket{MODEL}{RATE}))"
    return tuple((f"histogram_quantile({q}, {buckets})", f"{{{{model}}}} p{100 * q:g}") for q in quantiles)


def _rate(metric: str, by: str = "model", labels: str = MODEL) -> str:
    return f"sum by ({by}) (rate({metric}{labels}{RATE}))"


def _total(metric: str, by: str = "model", labels: str = MODEL) -> str:
    return f"sum by ({by}) (increase({metric}{labels}{TIME_RANGE}))"


TOKENS = f"({_rate('llmrun_prompt_tokens_total')} + {_rate('llmrun_completion_tokens_total')})"
ROWS: dict[str, tuple[Panel, ...]] = {
    "Requests and tokens": (
        Panel(
            "Requests/s",
            "reqps",
            ((_rate("llmrun_requests_total", "model, status"), "{{model}} {{status}}"),),
            "Finished requests. 499: the client disconnected.",
        ),
        Panel(
            "Tokens/s",
            "short",
            (
                (_rate("llmrun_prompt_tokens_total"), "{{model}} prompt"),
                (_rate("llmrun_completion_tokens_total"), "{{model}} completion"),
            ),
        ),
        Panel(
            "Peak tokens/s",
            "short",
            ((f"max_over_time({_rate('llmrun_completion_tokens_total')}[$__range:])", "{{model}}"),),
            "Highest rate of completion tokens in the time range.",
            "stat",
        ),
        Panel(
            "Tokens per request",
            "short",
            ((f"{TOKENS} / ({_rate('llmrun_requests_total', labels=SUCCESSFUL)} > 0)", "{{model}}"),),
            "Prompt and completion tokens per successful request.",
        ),
        Panel(
            "Prompt to completion tokens",
            "short",
            (
                (
                    f"{_rate('llmrun_prompt_tokens_total')} / ({_rate('llmrun_completion_tokens_total')} > 0)",
                    "{{model}}",
                ),
            ),
            "Prompt tokens per completion token.",
        ),
        Panel(
            "Requests in the time range",
            "short",
            ((_total("llmrun_requests_total"), "{{model}}"),),
            kind="bargauge",
        ),
        Panel(
            "Tokens in the time range",
            "short",
            (
                (_total("llmrun_prompt_tokens_total"), "{{model}} prompt"),
                (_total("llmrun_completion_tokens_total"), "{{model}} completion"),
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
            "Completion tokens.",
        ),
    ),
    "Latency": (
        Panel(
            "Time to first token",
            "s",
            _quantiles("llmrun_time_to_first_token_seconds", 0.5, 0.9, 0.99),
            "Streamed responses. From the request's arrival, including queueing and cold starts.",
        ),
        Panel(
            "Time per output token",
            "s",
            _quantiles("llmrun_time_per_output_token_seconds", 0.5, 0.9, 0.99),
            "Streamed responses. After the first token, measured in the engine.",
        ),
        Panel("Request duration", "s", _quantiles("llmrun_request_seconds", 0.5, 0.9, 0.99)),
    ),
    "Queues and caches": (
        Panel(
            "Waiting",
            "short",
            ((f"sum by (model) (llmrun_requests_waiting{MODEL})", "{{model}}"),),
            "Requests waiting for a replica.",
        ),
        Panel(
            "In flight",
            "short",
            ((f"sum by (model) (llmrun_requests_in_flight{MODEL})", "{{model}}"),),
            "Requests being processed by replicas.",
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            ((f"max by (model, replica) (vllm:kv_cache_usage_perc{MODEL})", "{{model}} {{replica}}"),),
            "Reported by vLLM. Empty if no replica runs, or with log_engine_metrics=False.",
        ),
        Panel(
            "Prompt tokens from cache",
            "percentunit",
            (
                (
                    f"{_rate('llmrun_cached_prompt_tokens_total')} / ({_rate('llmrun_prompt_tokens_total')} > 0)",
                    "{{model}}",
                ),
            ),
            "Share of prompt tokens that engines did not have to compute.",
        ),
        Panel("Weights on nodes", "bytes", (("max by (node) (llmrun_weights_cache_bytes)", "{{node}}"),)),
        Panel(
            "Weights requested",
            "short",
            (
                (
                    "sum by (node, outcome) (increase(llmrun_weights_needed_total[$__range]))",
                    "{{node}} {{outcome}}",
                ),
            ),
            "In the time range: already on the node, downloaded, or failed.",
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
            width=2 * PANEL_WIDTH,
        ),
        Panel(
            "Replicas",
            "short",
            (
                (f"sum by (model) (llmrun_replicas_ready{MODEL})", "{{model}} ready"),
                (f"sum by (model) (llmrun_replicas_target{MODEL})", "{{model}} target"),
            ),
        ),
        Panel(
            "Wakes",
            "short",
            ((_total("llmrun_wakes_total", "model, outcome"), "{{model}} {{outcome}}"),),
            "In the time range. withdrawn: all waiting clients disconnected.",
            "bargauge",
        ),
        Panel(
            "Cold start to first token",
            "s",
            (
                (
                    f"{_total('llmrun_cold_start_seconds_sum')} / ({_total('llmrun_cold_start_seconds_count')} > 0)",
                    "{{model}}",
                ),
            ),
            "Mean of the cold starts in the time range.",
            "bargauge",
        ),
        Panel(
            "Cold start phases",
            "s",
            (
                (
                    f"{_total('llmrun_cold_start_part_seconds_sum', 'model, part')} / "
                    f"({_total('llmrun_cold_start_part_seconds_count', 'model, part')} > 0)",
                    "{{model}} {{part}}",
                ),
            ),
            "Mean of the cold starts in the time range.",
            "bargauge",
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana's JSON model."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        position = {"x": 0, "y": y, "w": GRID_WIDTH, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": position, "panels": []})
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > GRID_WIDTH:
                x, y = 0, y + PANEL_HEIGHT
            position = {"x": x, "y": y, "w": panel.width, "h": PANEL_HEIGHT}
            panels.append({"id": len(panels) + 1, "gridPos": position, "datasource": source, **_render(panel)})
            x += panel.width
        y += PANEL_HEIGHT
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


def _render(panel: Panel) -> dict[str, Any]:
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
        "description": panel.description,
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
