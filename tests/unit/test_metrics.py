"""The metrics for Prometheus and the files of `llmrun dashboards`, without a cluster."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.requests import Request

from llmrun_cli.commands.dashboards import files
from llmrun_cli.grafana import dashboard
from llmrun_runtime.asgi import Send
from llmrun_runtime.control.autoscaling.cold_starts import ColdStarts
from llmrun_runtime.control.metrics import Paces, node_families
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.engines.shim import usage_meter
from llmrun_runtime.engines.sidecar import server
from llmrun_runtime.ingress.endpoints.metrics_merge import merge
from llmrun_runtime.metric_labels import MAX_ADAPTERS, OTHERS, AdapterLabels
from llmrun_runtime.weights.node_weights import CacheInfo
from llmrun_runtime.wire.reports import AdapterRevision, ReplicaReport
from llmrun_runtime.wire.usage import PACE_BUCKETS, PaceRow
from tests.support.cluster import Home
from tests.support.factories import report
from tests.support.ingress import CHAT, Bench, Engine, route, running_ingress

RESPONSES = "/v1/responses"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page is gathered anew."""
    monkeypatch.setattr("llmrun_runtime.ingress.app.METRICS_KEPT_S", -1)


def parsed(text: str) -> Samples:
    """Return a page's values by name and labels. Each name must have one family."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """Return the key of a value. An empty label counts as none."""
    return name, frozenset(labels.items())


async def page(bench: Bench) -> Samples:
    """Return the ingress's page."""
    async with bench.session.get(bench.url + "/metrics") as answer:
        return parsed(await answer.text())


def test_pages_are_merged() -> None:
    one = '# HELP a_total Text of a.\n# TYPE a_total counter\na_total{x="1"} 1.0\n# TYPE b gauge\nb 2.0\n'
    two = '# HELP a_total Other.\n# TYPE a_total counter\na_total{x="{ model=",model="\\"m"} 3.0\n'
    two += "# EOF\nc{} 4 1700000000000\n"
    text = merge([(one, {"model": 'q"\\'}), ("", {"model": "none"}), (two, {"model": "n", "replica": "r"}), (one, {})])
    samples = parsed(text)
    assert samples[key("a_total", x="1", model='q"\\')] == samples[key("a_total", x="1")] == 1
    assert samples[key("a_total", x="{ model=", exported_model='"m', model="n", replica="r")] == 3
    assert samples[key("b", model='q"\\')] == samples[key("b")] == 2 and samples[key("c", model="n", replica="r")] == 4
    assert text.count("# HELP a_total ") == text.count("# TYPE a_total ") == 1 and "Text of a." in text
    assert merge([]) == merge([("", {"a": "b"})]) == ""


def test_adapters_beyond_the_limit_share_a_label() -> None:
    label = AdapterLabels()
    assert (label("one", ""), label("one", "sql"), label("one", "sql@v2")) == ("", "sql", "sql")
    assert [label("two", f"a{n}") for n in range(MAX_ADAPTERS)] == [*(f"a{n}" for n in range(MAX_ADAPTERS - 1)), OTHERS]
    assert (label("two", ""), label("one", "sql"), label("three", "sql")) == ("", "sql", OTHERS)


async def test_requests_are_counted_by_model_and_adapter(bench: Bench, engine: Engine) -> None:
    pins = {"sql": "pin-1", "legal": "pin-2"}
    paths = frozenset({CHAT, RESPONSES})
    bench.table(route(engine.port, max_ongoing=1, lora=True, adapters=pins, paths=paths))
    bench.revisions["sql@v1"] = AdapterRevision(pin="pin-0")
    for model in ("one", "org/one:sql", "one:sql@v1"):
        assert (await bench.post({"model": model, "stream": True}))[0] == 200
    assert (await bench.post({"model": "one", "refuse": 1, "stream": True}))[0] == 400
    assert (await bench.post({"model": "one", "stream": True}, RESPONSES))[0] == 200
    assert (await bench.post({"model": "one:nobody"}))[0] == 404
    samples = await page(bench)
    mine = {"ingress": "ingress", "model": "one"}
    assert samples[key("llmrun_requests_total", **mine, adapter="sql", status="200")] == 2
    assert samples[key("llmrun_requests_total", **mine, adapter="", status="200")] == 2
    assert samples[key("llmrun_requests_total", **mine, adapter="", status="400")] == 1
    assert samples[key("llmrun_requests_total", ingress="ingress", model="", adapter="", status="404")] == 1
    first = "llmrun_time_to_first_token_seconds_count"  # not counted: refusals, and events before the first token
    assert samples[key(first, **mine, adapter="sql")] == 2 and samples[key(first, **mine, adapter="")] == 1
    assert samples[key("llmrun_time_to_first_byte_seconds_count", **mine)] == 5
    requests = [asyncio.create_task(bench.post({"model": f"one:{name}", "stall": 0.3})) for name in ("sql", "legal")]
    while not bench.queue.by_adapter()[0]:
        await asyncio.sleep(0.01)
    samples = await page(bench)
    assert samples[key("llmrun_requests_in_flight", **mine, adapter="sql")] == 1
    assert samples[key("llmrun_requests_waiting", **mine, adapter="legal")] == 1
    assert samples[key("llmrun_requests_waiting", **mine, adapter="")] == 0
    await asyncio.gather(*requests)
    assert bench.queue.by_adapter() == ({}, {})


async def test_an_unresponsive_engine_blocks_neither_metrics_nor_requests(engine: Engine) -> None:
    class UnresponsiveEngine(Engine):
        async def respond(self, request: Request, send: Send) -> None:
            if request.url.path == "/metrics":
                await asyncio.sleep(60)
            await super().respond(request, send)

    async with UnresponsiveEngine().running() as unresponsive, running_ingress(metrics_timeout=1) as bench:
        bench.table(
            route(engine.port), route(unresponsive.port, name="two", names=("two",)), control=engine.serve_http()
        )
        started = time.monotonic()
        pending = asyncio.create_task(page(bench))
        while not unresponsive.requests:
            await asyncio.sleep(0.01)
        assert (await bench.post({"model": "two"}))[0] == 200 and not pending.done()
        samples = await pending
        assert 0.9 < time.monotonic() - started < 3
    replica = bench.queue.table.models["one"].replicas[0].id
    assert samples[key("vllm:tokens_total", model="one", replica=replica, model_name="one")] == 7
    assert not [labels for name, labels in samples if name == "vllm:tokens_total" and ("model", "two") in labels]


def test_the_time_per_output_token_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.03, 10.1, 20.0, 30.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    stream, whole, broken_off = (usage_meter.Stream("test:pace") for _ in range(3))
    for tokens in (3, 1, 4):  # 5 tokens after the first chunk, in a tenth of a second
        stream.add(tokens)
    whole.add(100)
    broken_off.add(1)
    for each in (stream, whole, broken_off, usage_meter.Stream("test:pace")):
        each.finish()
    (row,) = [row for row in usage_meter.snapshot()["paces"] if row[0] == "test:pace"]
    assert row[1] == pytest.approx(0.02) and sum(row[2:]) == 1 and len(row) == 2 + len(PACE_BUCKETS) + 1
    assert json.loads(json.dumps(row)) == list(row)


def test_the_pace_of_chunks_that_are_not_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.1, 11.0, 12.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    before = {row[0]: row for row in usage_meter.snapshot()["paces"]}.get("", ("", 0.0))
    pace, several = server._Pace(), server._Pace()
    for text in ("a b c", "d e f"):
        pace.add({"choices": [{"index": 0, "delta": {"content": text}}]}, 0)
    pace.add({"choices": [], "usage": {}}, 6)
    for index in (0, 1, 0):
        several.add({"choices": [{"index": index, "text": "a"}]}, 0)
    pace.finish()
    several.finish()
    (row,) = [row for row in usage_meter.snapshot()["paces"] if row[0] == ""]
    assert row[1] - before[1] == pytest.approx(0.1 / 5)


def pace(total: float, *counts: int) -> PaceRow:
    """Return a row of an engine's report."""
    row: tuple[Any, ...] = ("one:sql", total, *counts, *[0] * (len(PACE_BUCKETS) + 1 - len(counts)))
    return row


def pace_report(row: PaceRow, previous: PaceRow | None, replica: str = "r1") -> ReplicaReport:
    """Return a replica's report with that row."""
    return report(replica=replica, paces=((row, previous),))


def times(paces: Paces) -> tuple[float, float]:
    """Return the sum and the number of the times."""

    class PacesCollector(Collector):
        def collect(self) -> list[Metric]:
            return [paces.family(["cold"])]

    samples = parsed(generate_latest(PacesCollector()).decode())
    name, labels = "llmrun_time_per_output_token_seconds", {"model": "one", "adapter": "sql"}
    assert samples[key(f"{name}_count", model="cold", adapter="")] == 0
    assert samples[key(f"{name}_bucket", **labels, le="+Inf")] == samples[key(f"{name}_count", **labels)]
    return samples[key(f"{name}_sum", **labels)], samples[key(f"{name}_count", **labels)]


def test_paces_are_added_up_once_despite_restarts() -> None:
    paces = Paces(AdapterLabels())
    paces.report(pace_report(pace(1, 2), None))
    paces.report(pace_report(pace(1, 2), None))  # control's reply was late: reported again
    paces.report(pace_report(pace(3, 2, 3), pace(1, 2)))
    paces.report(pace_report(pace(1, 1), None, "r2"))
    assert times(paces) == (4, 6)
    paces.report(pace_report(pace(0.5, 0, 1), None))  # it restarted its engine
    paces.keep(["r1"])
    assert times(paces) == (4.5, 7)
    again = Paces(AdapterLabels())  # a restarted control does not count again what the first one received
    again.report(pace_report(pace(0.75, 0, 2), pace(0.5, 0, 1)))
    again.report(pace_report(pace(1.0, 0, 3), pace(0.75, 0, 2)))
    assert times(again) == (0.5, 2)


def test_wakes_are_counted_by_outcome(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    starts = ColdStarts(Database(f"sqlite:///{tmp_path / 'test.db'}"), registry)
    starts.create_series(["one"])

    def wakes() -> dict[str, float]:
        samples = parsed(generate_latest(registry).decode())
        return {dict(labels)["outcome"]: n for (name, labels), n in samples.items() if name == "llmrun_wakes_total"}

    assert wakes() == {"ready": 0, "failed": 0, "withdrawn": 0}
    ready = report("ready")
    starts.begin("one", 1, time.time())
    starts.begin("one", 1, time.time())
    starts.replica_ready(ready)
    starts.replica_ready(ready)
    starts.end("one", 1, "failed")  # none is in progress
    assert wakes() == {"ready": 1, "failed": 0, "withdrawn": 0}
    starts.begin("one", 1, time.time())
    starts.end("one", 1, "failed")
    starts.begin("one", 2, time.time())
    starts.forget("one")
    assert wakes() == {"ready": 1, "failed": 1, "withdrawn": 1}


def grid_cells(panels: list[dict[str, Any]]) -> set[tuple[int, int]]:
    """Return the grid cells of the panels, which must not overlap or exceed the width."""
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        own = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not own & cells and at["x"] + at["w"] <= 24, panel["title"]
        cells |= own
    return cells


def test_the_dashboard_can_be_imported() -> None:
    loaded = json.loads(json.dumps(dashboard()))
    panels = loaded["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and grid_cells(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    names = {variable["name"]: variable for variable in loaded["templating"]["list"]}
    assert names["model"]["query"]["query"] == "label_values(llmrun_model_state, model)"
    for panel in panels:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_written_files_name_the_cluster_and_their_own_paths(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "with space" / "ops"
    out = home.run("dashboards", "--out", folder, "--scrape-interval", "5")
    names = files(folder, home.url, "http://127.0.0.1:9090", 5)
    assert out.returncode == 0 and out.stdout.splitlines() == [f"{folder / name}: created" for name in names]
    assert f"prometheus --config.file='{folder}/prometheus.yml'" in out.stderr
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert (job["scheme"], job["metrics_path"]) == ("http", "/metrics")
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{home.port}"]}]
    assert (config["global"]["scrape_interval"], config["global"]["scrape_timeout"]) == ("5s", "5s")
    provider = yaml.safe_load((folder / "grafana/provisioning/dashboards/llmrun.yaml").read_text())["providers"][0]
    assert (Path(provider["options"]["path"]) / "llmrun.json").is_file()
    source = yaml.safe_load((folder / "grafana/provisioning/datasources/llmrun.yaml").read_text())["datasources"][0]
    written = json.loads((folder / "grafana/llmrun.json").read_text())
    assert source["uid"] == written["templating"]["list"][0]["current"]["value"]
    assert home.ok("dashboards", "--out", folder, "--scrape-interval", "5").count("unchanged") == len(names)
    error = home.fails("dashboards", "--out", folder)
    assert "already contains a different prometheus.yml" in error and "--force" in error and "llmrun.json" not in error
    assert home.ok("dashboards", "--out", folder, "--force").count("overwritten") == 2


def test_an_address_behind_a_proxy() -> None:
    config = files(Path("/x"), "https://llm.example/base/", "http://prometheus:9090", 60)["prometheus.yml"]
    (job,) = yaml.safe_load(config)["scrape_configs"]
    assert (job["scheme"], job["metrics_path"]) == ("https", "/base/metrics")
    assert job["static_configs"] == [{"targets": ["llm.example"]}]
    assert "scrape_timeout: 10s" in config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "file"], "file: not a folder"),
        (["--out", "file/below"], "cannot write: Not a directory"),
        (
            ["--out", "new", "--url", "10.0.0.5:8000"],
            "--url 10.0.0.5:8000: not a valid URL; must be like http://10.0.0.5:8000",
        ),
        (["--out", "new", "--url", "http://x:y"], "not a valid URL"),
        (["--out", "new", "--prometheus", "prometheus"], "--prometheus prometheus: not a valid URL"),
    ],
)
def test_dashboards_that_cannot_be_written(home: Home, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "file").write_text("mine")
    error = home.fails(
        "dashboards", *(str(tmp_path / a) if a in ("file", "file/below", "new") else a for a in arguments)
    )
    assert words in error and not (tmp_path / "new").exists() and (tmp_path / "file").read_text() == "mine"


def test_two_ray_nodes_at_one_address_are_added_up() -> None:
    caches = [("a", CacheInfo(5, 1, 2, 3)), ("a", CacheInfo(5, 10, 20, 30)), ("b", CacheInfo(7, 0, 1, 0))]
    samples = [sample for family in node_families(caches) for sample in family.samples]
    values = {tuple(sample.labels.values()): sample.value for sample in samples}
    assert len(samples) == len(values) and values["a",] == 5 and values["b",] == 7
    assert [values["a", outcome] for outcome in ("found", "brought", "failed")] == [11, 22, 33]
