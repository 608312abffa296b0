"""`llmrun dashboards`: writes what Prometheus and Grafana need to show a cluster. Asks none of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from llmrun.errors import LLMRunError
from llmrun.settings import Settings
from llmrun_cli.grafana import DATASOURCE, dashboard
from llmrun_cli.terminal import note, out

HEADER = "# Written by `llmrun dashboards`; docs/metrics.md has every metric.\n"
MOST_TIMEOUT_S = 10


def dashboards(
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.")],
    url: Annotated[str, typer.Option(help="The ingress, by default LLMRUN_URL.")] = "",
    prometheus: Annotated[
        str, typer.Option(help="Prometheus, as Grafana reaches it.", metavar="URL")
    ] = "http://127.0.0.1:9090",
    scrape_interval: Annotated[int, typer.Option(help="Seconds between two looks at the cluster.", min=1)] = 15,
    force: Annotated[bool, typer.Option("--force", help="Write over files that differ.")] = False,
) -> None:
    """Write a Grafana dashboard and a Prometheus configuration for this cluster."""
    where = folder.expanduser().absolute()
    written = _write(where, files(where, url or Settings().resolved_url(), prometheus, scrape_interval), force=force)
    for path, what in written.items():
        out.print(f"{path}: {what}")
    at = {name: shlex.quote(str(where / name)) for name in ("prometheus.yml", "data", "grafana/provisioning")}
    note(f"start: prometheus --config.file={at['prometheus.yml']} --storage.tsdb.path={at['data']}")
    note(f"       GF_PATHS_PROVISIONING={at['grafana/provisioning']} grafana server --homepath /usr/share/grafana")
    note("a Grafana that runs already: import grafana/llmrun.json there")


def files(folder: Path, url: str, prometheus: str, interval: int) -> dict[str, str]:
    """What is written, by its path below `folder` (absolute). Raises LLMRunError."""
    _address(prometheus, "--prometheus")
    return {
        "prometheus.yml": HEADER + _prometheus(url, interval),
        "grafana/llmrun.json": json.dumps(dashboard(), indent=2) + "\n",
        "grafana/provisioning/datasources/llmrun.yaml": HEADER + _datasource(prometheus, interval),
        "grafana/provisioning/dashboards/llmrun.yaml": HEADER + _provider(folder / "grafana"),
    }


def _prometheus(url: str, interval: int) -> str:
    """`/metrics` needs no key, and has the whole cluster: there is one target."""
    scheme, host, path = _address(url, "--url")
    return f"""global:
  scrape_interval: {interval}s
  scrape_timeout: {min(interval, MOST_TIMEOUT_S)}s
  evaluation_interval: {interval}s
scrape_configs:
  - job_name: llmrun
    scheme: {scheme}
    metrics_path: {json.dumps(path + "/metrics")}
    static_configs:
      - targets: [{json.dumps(host)}]
"""


def _datasource(prometheus: str, interval: int) -> str:
    return f"""apiVersion: 1
datasources:
  - name: llmrun
    type: prometheus
    uid: {DATASOURCE}
    access: proxy
    url: {json.dumps(prometheus)}
    jsonData:
      timeInterval: {interval}s
"""


def _provider(folder: Path) -> str:
    return f"""apiVersion: 1
providers:
  - name: llmrun
    type: file
    options:
      path: {json.dumps(str(folder), ensure_ascii=False)}
"""


def _address(url: str, option: str) -> tuple[str, str, str]:
    """Scheme, host with its port, and path. Raises LLMRunError."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:  # a port that is none
        good = False
    if not good or parts.username or parts.query or parts.fragment:
        raise LLMRunError(f"{option} {url}: it is no address like http://10.0.0.5:8000")
    return parts.scheme, parts.netloc, parts.path.rstrip("/")


def _write(folder: Path, texts: Mapping[str, str], *, force: bool) -> dict[Path, str]:
    """Write all files, or none; what has become of each. Raises LLMRunError."""
    if folder.exists() and not folder.is_dir():
        raise LLMRunError(f"--out {folder}: it is a file: name a folder")
    try:
        there = {name: (folder / name).read_text() for name in texts if (folder / name).exists()}
        differ = [name for name, text in there.items() if text != texts[name]]
        if differ and not force:
            raise LLMRunError(f"{folder} has another {', '.join(differ)}: name another folder, or --force")
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "a file there is no text"
        raise LLMRunError(f"--out {folder}: {why}: name a folder that can be written to") from None
    return {
        folder / name: "written" if name not in there else "written over" if name in differ else "is there already"
        for name in texts
    }
