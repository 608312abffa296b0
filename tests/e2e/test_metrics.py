"""`/metrics` of a running cluster, and `llmrun dashboards` with a real Prometheus that runs all of its queries."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.adapters import make_adapter
from tests.support.cluster import REPO, Home, free_port, until, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
# The values that Grafana would substitute for its variables.
VARIABLES = {"$model": ".*", "$__rate_interval": "20s", "$__range": "60s"}
INSTALL = "a real Prometheus is needed: `apt-get install prometheus` (`just test` does it where it may)"


@contextlib.contextmanager
def prometheus(folder: Path) -> Iterator[str]:
    """Run Prometheus with the configuration in `folder`; yield its URL."""
    assert shutil.which("prometheus") and shutil.which("promtool"), INSTALL
    subprocess.run(["promtool", "check", "config", folder / "prometheus.yml"], check=True, capture_output=True)
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'data'}"], stdout=log, stderr=log)

        def ready() -> bool:
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"http://{address}/-/ready", timeout=5).is_success
            return False

        try:
            until(ready, 30, "Prometheus is ready")
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(20)


def questions(folder: Path) -> dict[str, str]:
    """Return the queries of the generated dashboard, by panel title and reference ID."""
    panels = json.loads((folder / "grafana/llmrun.json").read_text())["panels"]
    queries = {}
    for panel in panels:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            queries[f"{panel['title']} {target['refId']}"] = query
    return queries


def on_the_page(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Return the type and labels of llmrun's metrics on a `/metrics` page."""
    return {
        family.name: (family.type, frozenset(label for sample in family.samples for label in sample.labels) - {"le"})
        for family in text_string_to_metric_families(text)
        if family.name.startswith("llmrun_")
    }


def in_the_docs() -> dict[str, tuple[str, frozenset[str]]]:
    """Return the type and labels of the metrics in the table of docs/reference/metrics.md."""
    page = (REPO / "docs/reference/metrics.md").read_text()
    rows = re.findall(r"^\| `(llmrun_\w+)`[^|]*\| (\w+) \| ([^|]+) \|", page, re.M)
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def answers(url: str, query: str) -> list[float]:
    """Return the finite values of an instant query."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10)
    assert answer.status_code == 200, f"{query}: {answer.text}"
    values = [float(row["value"][1]) for row in answer.json()["data"]["result"]]
    return [value for value in values if math.isfinite(value)]


def test_every_query_of_the_dashboard_returns_data(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    make_adapter(tmp_path / "adapters" / "legal", seed=1)
    lora = f"lora={str(tmp_path / 'adapters')!r}"
    text = f"@llm({str(tiny_weights)!r}, cpus=0.2, idle_timeout=600, {lora})\nclass Measured: ...\n"
    out = tmp_path / "out"
    output = cluster.ok("dashboards", "--out", out, "--scrape-interval", "1")
    assert "prometheus.yml: created" in output and "prometheus --config.file=" in output
    assert "unchanged" in cluster.ok("dashboards", "--out", out, "--scrape-interval", "1")
    assert "--force" in cluster.fails("dashboards", "--out", out)
    with prometheus(out) as url:
        until(lambda: answers(url, "up") == [1], 30, "the cluster is scraped")
        cluster.ok("deploy", write_app(tmp_path / "measured" / "app.py", text), "--lazy")

        expected = Counter[str]()

        def ask(model: str) -> None:
            body = {"model": model, "prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": True, "stream": True}
            body["stream_options"] = {"include_usage": True}
            answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=240)
            assert answer.status_code == 200, answer.text
            usage = json.loads(answer.text.split("data: ")[-2])["usage"]
            expected[model] += 1
            expected[f"{model} prompt"] += usage["prompt_tokens"]
            expected[f"{model} completion"] += usage["completion_tokens"]

        ask("measured")  # from zero
        left = questions(out)
        assert len(left) > 25

        def all_answered() -> bool:
            ask("measured")
            ask("measured:legal")
            for title in [title for title, query in left.items() if answers(url, query)]:
                del left[title]
            return not left

        with contextlib.suppress(AssertionError):
            until(all_answered, 60, "every query returns data")
        assert left == {}

        assert on_the_page(httpx.get(f"{cluster.url}/metrics").text) == in_the_docs()

        def value(query: str) -> float:
            return sum(answers(url, query))

        def counted() -> bool:
            return all(
                value(f'llmrun_{metric}{{model="measured",adapter="{adapter}"{more}}}') == expected[model + of]
                for model, adapter in (("measured", ""), ("measured:legal", "legal"))
                for metric, of, more in (
                    ("requests_total", "", ',status="200"'),
                    ("time_to_first_token_seconds_count", "", ""),
                    ("time_per_output_token_seconds_count", "", ""),
                    ("prompt_tokens_total", " prompt", ""),
                    ("completion_tokens_total", " completion", ""),
                )
            )

        until(counted, 30, f"the counters match {expected}")

        assert value('llmrun_model_state{model="measured",state="hot"}') == 1
        assert (
            value('llmrun_replicas_ready{model="measured"}') == value('llmrun_replicas_target{model="measured"}') == 1
        )
        assert value('llmrun_wakes_total{model="measured",outcome="ready"}') == 1
        cluster.ok("unload", "measured")
        until(lambda: value('llmrun_model_state{model="measured",state="cold"}') == 1, 60, "the model is cold again")
        assert counted(), "they outlive the replica"
    cluster.ok("delete", "measured", "--yes")


def test_dashboards_rejects_invalid_arguments(home: Home, tmp_path: Path) -> None:
    def wrong(*args: Any) -> str:
        return home.fails("dashboards", "--out", *args)

    (tmp_path / "file").write_text("")
    assert "file: not a folder" in wrong(tmp_path / "file")
    assert "--url ftp://x: not a valid URL; must be like http://10.0.0.5:8000" in wrong(
        tmp_path / "a", "--url", "ftp://x"
    )
    assert not (tmp_path / "a").exists()
