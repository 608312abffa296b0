"""Models whose weights come from real stores, through the real command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Home, second_node, until, write_app
from tests.support.servers import AWS, Hub, Proxy, gcs_server, hub_server, proxy_to, s3_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    """A folder of buckets, one of which contains the tiny model."""
    folder = tmp_path_factory.mktemp("buckets")
    shutil.copytree(tiny_weights, folder / "acme" / "models" / "tiny")
    return folder


@pytest.fixture(scope="module")
def s3(buckets: Path) -> Iterator[Proxy]:
    """A real S3 server that requires keys, behind a proxy that counts the bytes sent."""
    with s3_server(buckets) as server, proxy_to(server.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[Hub]:
    """A small Hugging Face Hub that contains the tiny model."""
    with hub_server() as server:
        server.repos["acme/tiny"] = tmp_path_factory.mktemp("hub") / "tiny"
        shutil.copytree(tiny_weights, server.repos["acme/tiny"])
        yield server


def write_weights_app(path: Path, source: str, **options: str) -> Path:
    """Write an app with one model whose weights come from `source`."""
    more = "".join(f", {key}={value!r}" for key, value in options.items())
    text = f"from llmrun import Weights\n\n@llm(Weights({source!r}{more}), cpus=0.3, idle_timeout=3, env={AWS!r})\n"
    return write_app(path, f"{text}class Tiny: ...\n")


def deploy(cluster: Home, app: Path, *flags: str) -> str:
    """Deploy the app, replacing the previous one; return the command's output."""
    return cluster.ok("deploy", app, "--name", "stores", "--adopt", *flags)


@pytest.fixture(scope="module", autouse=True)
def cleanup(cluster: Home) -> Iterator[None]:
    """Remove the model and all weights after the last test."""
    yield
    remove(cluster)


def remove(cluster: Home) -> None:
    """Delete the model and all unused weights."""
    if cluster.find("tiny"):
        cluster.ok("delete", "tiny", "--yes")
    # The cluster still lists a node for some seconds after another test has killed it.
    until(lambda: cluster.run("weights", "prune", "--yes").returncode == 0, 60, "the weights are removed")


@pytest.fixture
def deployed_from_s3(cluster: Home, tmp_path: Path, s3: Proxy) -> int:
    """Deploy the model with weights from S3; return its version."""
    remove(cluster)
    deploy(cluster, write_weights_app(tmp_path / "before.py", "s3://acme/models/tiny", endpoint_url=s3.url))
    return int(cluster.status("tiny")["version"])


def test_weights_from_s3_are_downloaded_only_once(cluster: Home, tmp_path: Path, buckets: Path, s3: Proxy) -> None:
    remove(cluster)
    before = s3.sent
    app = write_weights_app(tmp_path / "s3.py", "s3://acme/models/tiny", endpoint_url=s3.url)
    output = deploy(cluster, app)
    assert "+ tiny  s3://acme/models/tiny (" in output and "tiny: downloading weights s3://acme/models/tiny (" in output
    assert cluster.ask("tiny").status_code == 200
    files = [path for path in (buckets / "acme" / "models" / "tiny").iterdir() if path.is_file()]
    moved = s3.sent - before
    assert moved == sum(path.stat().st_size for path in files)
    status = cluster.status("tiny")
    assert len(status["pin"]) == 12 and status["pin"] in output
    assert f"s3://acme/models/tiny ({status['pin']})" in cluster.ok("status", "tiny")
    (row,) = json.loads(cluster.ok("weights", "list", "--json"))
    assert (row["pinned_by"], row["short"], row["bytes"]) == (["tiny"], status["pin"], moved)
    assert "in use by tiny" in cluster.fails("weights", "remove", "s3://acme/models/tiny")
    cluster.wait_for("tiny", "cold", 30)
    assert cluster.ask("tiny").status_code == 200
    assert "no changes" in deploy(cluster, app)
    assert s3.sent == before + moved


def test_a_deploy_reports_store_errors_in_one_line(cluster: Home, tmp_path: Path, s3: Proxy, hub: Hub) -> None:
    app = write_weights_app(tmp_path / "none.py", "s3://acme/models/none", endpoint_url=s3.url)
    error = cluster.fails("deploy", app, "--name", "stores", "--adopt")
    assert "s3://acme/models/none: no files found at that address (on node 127.0.0.2 (" in error
    hub.gated.add("acme/tiny")
    app = write_weights_app(tmp_path / "gated.py", "acme/tiny", endpoint_url=hub.url)
    error = cluster.fails("deploy", app, "--name", "stores", "--adopt")
    assert f"accept its licence at {hub.url}/acme/tiny, and set HF_TOKEN" in error and "on node 127.0.0.2" in error
    hub.gated.clear()
    app = write_weights_app(tmp_path / "az.py", "az://acme/tiny")
    assert "pip install adlfs" in cluster.fails("deploy", app, "--name", "stores", "--adopt")


def test_weights_from_the_hub_stay_pinned_when_the_branch_moves(
    cluster: Home, tmp_path: Path, hub: Hub, deployed_from_s3: int
) -> None:
    hub.downloads.clear()
    app = write_weights_app(tmp_path / "hub.py", "acme/tiny", endpoint_url=hub.url)
    assert "~ tiny  (new engine" in deploy(cluster, app)
    assert cluster.ask("tiny").status_code == 200
    # The weights are the same as those from S3, so the large files were not downloaded again.
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]
    before = cluster.status("tiny")["pin"]
    (hub.repos["acme/tiny"] / "generation_config.json").write_text('{"do_sample": false}')
    output = cluster.ok("deploy", app, "--name", "stores", "--dry-run")
    assert f"weights {before} → " in output and "~ tiny  (new engine" in output
    assert cluster.ask("tiny").status_code == 200
    assert cluster.status("tiny")["pin"] == before
    assert "tiny deployed, not started" in deploy(cluster, app, "--lazy").replace(
        f"version {deployed_from_s3 + 2} ", ""
    )
    assert cluster.status("tiny")["pin"] != before


def test_weights_from_gcs(cluster: Home, tmp_path: Path, buckets: Path, deployed_from_s3: int) -> None:
    with gcs_server(buckets) as url:
        app = write_weights_app(tmp_path / "gcs.py", "gs://anonymous@acme/models/tiny", endpoint_url=url)
        assert "~ tiny  (new engine" in deploy(cluster, app)
    assert cluster.ask("tiny").status_code == 200
    assert "Deleted tiny" in cluster.ok("delete", "tiny", "--yes")


def test_the_weights_commands(cluster: Home, tmp_path: Path, tiny_weights: Path, hub: Hub) -> None:
    remove(cluster)
    assert "folder not found" in cluster.fails(
        "weights", "import", tmp_path / "none", "--as", "acme/own", LLMRUN_URL=""
    )
    assert "folder /none not found on any node (127.0.0.2)" in cluster.fails(
        "weights", "import", "/none", "--as", "acme/own"
    )
    assert "a path is used in place" in cluster.fails("weights", "pull", str(tiny_weights))
    assert f"imported {tiny_weights} as acme/own (" in cluster.ok("weights", "import", tiny_weights, "--as", "acme/own")
    output = cluster.ok("weights", "list")
    assert "acme/own" in output and "imported " in output
    assert "is on every node" in cluster.ok("weights", "pull", "acme/tiny", "--endpoint-url", hub.url)
    assert "no damaged files" in cluster.ok("weights", "verify")
    (blob,) = [p for p in (cluster.path / "weights" / "blobs").iterdir() if p.stat().st_size > 2**23]
    with blob.open("r+b") as file:
        file.write(b"?")
    assert "model.safetensors is damaged: its " in cluster.fails("weights", "verify", "acme/own")
    assert "not found on any node" in cluster.fails("weights", "remove", "acme/other")
    assert "removed acme/tiny" in cluster.ok("weights", "remove", "acme/tiny")
    assert "bytes freed" in cluster.ok("weights", "prune", "--yes")
    assert json.loads(cluster.ok("weights", "list", "--json")) == []
    assert not list((cluster.path / "weights" / "blobs").iterdir())


def test_a_slow_pull_shows_its_progress(cluster: Home, buckets: Path, s3: Proxy) -> None:
    pull = ("weights", "pull", "s3://anonymous@acme/models/tiny", "--endpoint-url", s3.url)
    assert "access denied" in cluster.fails("weights", "pull", "s3://acme/models/tiny", "--endpoint-url", s3.url)
    with s3_server(buckets, keys=False) as server, proxy_to(server.url) as slow:
        pull = (*pull[:-1], slow.url)
        slow.fault.bytes_per_s = 2 * 2**20
        assert re.search(r"  127.0.0.2: [\d.]+ MB of 16.7 MB, [\d.]+ MB/s, \d+ s left", cluster.ok(*pull))
        assert "bytes freed" in cluster.ok("weights", "prune", "--yes")
        slow.fault.bytes_per_s = 6 * 2**20
        code, shown = cluster.run_on_a_terminal(*pull, answers="")
        assert code == 0 and "/16.7 MB" in shown and "MB/s" in shown and "is on every node" in shown
    assert "bytes freed" in cluster.ok("weights", "prune", "--yes")


def test_a_second_node_copies_weights_from_the_first(
    cluster: Home, tmp_path: Path, tiny_weights: Path, s3: Proxy
) -> None:
    cluster.ok("weights", "import", tiny_weights, "--as", "acme/own")
    with second_node(cluster, tmp_path / "second"):
        pull = ("weights", "pull", "acme/own")
        until(lambda: "127.0.0.3" in cluster.ok(*pull) + cluster.ok("weights", "list"), 60, "the node has joined")
        rows = json.loads(cluster.ok("weights", "list", "--json"))
        nodes = sorted(row["node"] for row in rows if row["source"] == "acme/own")
        assert nodes == ["127.0.0.2", "127.0.0.3"]
        own = (tmp_path / "second" / "weights" / "models").glob("*/model.safetensors")
        assert [path.read_bytes() for path in own] == [(tiny_weights / "model.safetensors").read_bytes()]
        assert "no damaged files" in cluster.ok("weights", "verify")
        assert "bytes freed" in cluster.ok("weights", "prune", "--yes")
        assert not list((tmp_path / "second" / "weights" / "blobs").iterdir())


def test_weights_are_mirrored_to_a_store(cluster: Home, tmp_path: Path, tiny_weights: Path, buckets: Path) -> None:
    remove(cluster)
    cluster.ok("weights", "import", tiny_weights, "--as", "acme/own")
    with gcs_server(buckets) as url:
        target = "gs://anonymous@acme/mirror/tiny"
        output = cluster.ok("weights", "mirror", "acme/own", target, "--endpoint-url", url)
        assert "6 files uploaded, 0 already there" in output
        app = write_weights_app(tmp_path / "mirror.py", target, endpoint_url=url)
        dry = ("deploy", app, "--name", "stores", "--adopt", "--dry-run")
        until(lambda: "on CPU" in cluster.run(*dry).stderr, 60, "Ray has detected that the second node is unavailable")
        deploy(cluster, app, "--lazy")
        assert cluster.ask("tiny").status_code == 200
    assert "Deleted tiny" in cluster.ok("delete", "tiny", "--yes")
    assert "a path is used in place" in cluster.fails("weights", "mirror", str(tiny_weights), target)
    assert "the target must be an object store" in cluster.fails("weights", "mirror", "acme/own", "acme/other")
