"""Weights from real stores into a node's cache, through the worker process that a node agent sends; and faults."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmrun.errors import WeightsError
from llmrun.settings import Settings
from llmrun.weights import Weights
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.cache import Cache
from llmrun_runtime.weights.node import NodeWeights
from llmrun_runtime.weights.pin import MANIFEST, File, Pin, choose
from llmrun_runtime.weights.transfer import PART_BYTES, Job, Transfer
from llmrun_runtime.weights.worker import Errand
from tests.adapters import make_adapter
from tests.conftest import until
from tests.servers import AWS, S3, Fault, Hub, Proxy, gcs_server, hub_server, proxy_to, s3_server

MIB = 2**20


# `LLMRUN_TEST_ADAPTERS=10000` is the size of docs/performance.md.
MANY = int(os.environ.get("LLMRUN_TEST_ADAPTERS", "500"))


@dataclass
class Node:
    """A node without Ray: a home, and workers that are sent as its agent sends them."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)
    sent: list[subprocess.Popen[str]] = field(default_factory=list)

    def close(self) -> None:
        """End its workers, as its agent's end does."""
        for process in self.sent:
            process.kill()
            process.wait(10)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    @property
    def cache(self) -> Cache:
        """Its cache."""
        return Cache(self.home / "weights")

    @property
    def environment(self) -> dict[str, str]:
        """Of its workers."""
        ours = ("LLMRUN_", "HF_", "AWS_", "GOOGLE_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        cache = {"LLMRUN_HOME": str(self.home), "HF_HOME": str(self.home / "hf")}
        return {**clean, **cache, **AWS, "RAY_none": "", **self.env}

    def start(self, do: str, *before: str, **fields: Any) -> subprocess.Popen[str]:
        """Send a worker; `before` goes in front of its command."""
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "llmrun_runtime.weights.worker"],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.sent.append(process)
        assert process.stdin
        process.stdin.write(Errand.model_validate({"do": do, **fields}).model_dump_json() + "\n")
        process.stdin.flush()
        return process

    def end(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Its word on the errand, `{"result": …}` or `{"error": …}`, when it is free again; then it is ended."""
        assert process.stdout and process.stderr and process.stdin
        said: list[dict[str, Any]] = []
        while not said or "free" not in said[-1]:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            said.append(json.loads(line))
        process.stdin.close()
        process.wait(10)
        return said[-2]

    def do(self, do: str, *before: str, **fields: Any) -> Any:
        """The errand's result."""
        word = self.end(self.start(do, *before, **fields))
        assert "result" in word, word
        return word["result"]

    def fails(self, do: str, *before: str, **fields: Any) -> str:
        """The errand's error."""
        word = self.end(self.start(do, *before, **fields))
        assert "error" in word, word
        return str(word["error"])

    def pin(self, weights: Weights) -> Pin:
        """What a source means now."""
        return Pin.model_validate(self.do("pin", weights=weights))

    def bring(self, pin: Pin, **fields: Any) -> Path:
        """The pin's folder."""
        return Path(self.do("bring", pin=pin, **fields))

    def partial(self) -> list[str]:
        """What is left of downloads."""
        folder = self.home / "weights" / "partial"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node with nothing on it."""
    made = Node(tmp_path / "node")
    yield made
    made.close()


def make_model(folder: Path, sizes: tuple[int, ...] = (3 * MIB,), seed: int = 0) -> Path:
    """A folder like a model's: the bytes of its weights are noise."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    (folder / "tokenizer.json").write_text("{}" * 1000)
    (folder / "README.md").write_text("not taken")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("not taken")
    for number, size in enumerate(sizes):
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            for start in range(0, size, MIB):
                file.write(os.urandom(min(size - start, MIB)))
    return folder


def taken(folder: Path) -> dict[str, bytes]:
    """The files of a model's folder that an engine needs, by name."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in (".md", ".onnx"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def buckets(tmp_path: Path) -> Path:
    """A folder of buckets."""
    (tmp_path / "buckets" / "acme").mkdir(parents=True)
    return tmp_path / "buckets"


@pytest.fixture
def s3(buckets: Path) -> Iterator[S3]:
    """A real S3 server."""
    with s3_server(buckets) as server:
        yield server


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    """In front of it."""
    with proxy_to(s3.url) as made:
        yield made


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A small Hub."""
    with hub_server() as server:
        yield server


def on_s3(proxy: Proxy | S3, path: str = "acme/model", **options: Any) -> Weights:
    """A source on that server."""
    return Weights(f"s3://{path}", endpoint_url=proxy.url, **options)


# What is taken of a source.


def names(*given: str, **options: Any) -> list[str]:
    """Which of the files are taken."""
    return [f.name for f in choose([File(name=name, size=1) for name in given], Weights("org/model", **options))]


def test_what_an_engine_needs_is_taken() -> None:
    few = ("config.json", "tokenizer.model", "chat_template.jinja", "1_Pooling/config.json", "modeling_x.py")
    never = (
        "README.md",
        "original/a.safetensors",
        "onnx/model.onnx",
        "flax_model.msgpack",
        "tf_model.h5",
        ".gitattributes",
    )
    assert names(*few, *never, "model.safetensors", "pytorch_model.bin") == sorted([*few, "model.safetensors"])
    assert names("config.json", "pytorch_model.bin", "training_args.bin") == ["config.json", "pytorch_model.bin"]
    assert names("params.json", "consolidated.safetensors") == ["consolidated.safetensors", "params.json"]
    both = ("config.json", "consolidated.safetensors", "model-1.safetensors")
    assert names(*both) == ["config.json", "model-1.safetensors"]
    assert names(*both, exclude=["model-*"]) == ["config.json", "consolidated.safetensors"]
    assert names("a/x.gguf", "b.txt", include=["*.gguf"]) == ["a/x.gguf"]


def test_a_source_that_holds_no_model_or_leaves_its_folder_is_refused() -> None:
    for given, words in {
        (): "no files at that address",
        ("notes.md",): "nothing there is taken",
        ("a.safetensors",): "there is no config.json",
        ("config.json", "../evil.json"): "would leave its folder",
        ("config.json", "/etc/x.json"): "would leave its folder",
        ("config.json", "a//b.json"): "would leave its folder",
        ("config.json", "a\\..\\b.json"): "would leave its folder",
        ("config.json", "a\n.json"): "would leave its folder",
    }.items():
        with pytest.raises(WeightsError, match=words):
            names(*given)


# From each store, whole and once.


def test_from_s3_once(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = taken(make_model(buckets / "acme" / "model", (3 * PART_BYTES + 5, MIB, 0)))
    pin = node.pin(on_s3(proxy))
    folder = node.bring(pin)
    assert taken(folder) == files and node.partial() == []
    assert proxy.sent == pin.total == sum(map(len, files.values()))
    asked = len(proxy.requests)
    assert node.bring(pin) == folder and len(proxy.requests) == asked
    assert node.pin(on_s3(proxy)).id == pin.id
    (found,) = node.cache.manifests()
    assert found[0].boot == "" and set(found[0].entries) == set(files)


def test_from_s3_without_credentials_and_with_wrong_ones(node: Node, buckets: Path, s3: S3) -> None:
    make_model(buckets / "acme" / "model")
    with s3_server(buckets, keys=False) as open_to_all:
        weights = Weights("s3://anonymous@acme/model", endpoint_url=open_to_all.url)
        assert "config.json" in os.listdir(node.bring(node.pin(weights)))
    assert "there is nothing at that address" in node.fails("pin", weights=on_s3(s3, "nowhere/x"))
    assert "there are no files at that address" in node.fails("pin", weights=on_s3(s3, "acme/x"))
    node.env["AWS_SECRET_ACCESS_KEY"] = "another"
    said = node.fails("pin", weights=on_s3(s3))
    assert "access denied" in said and "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


def test_over_tls_and_through_a_proxy(node: Node, buckets: Path, s3: S3, tmp_path: Path) -> None:
    files = taken(make_model(buckets / "acme" / "model", (2 * PART_BYTES + 1,)))
    certificate = tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tests -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*make.split(), "-keyout", certificate, "-out", tmp_path / "public"], check=True, capture_output=True
    )
    certificate.write_text(certificate.read_text() + (tmp_path / "public").read_text())
    server = S3(buckets, certificate=certificate)
    server.start()
    try:
        assert "SSL" in node.fails("pin", weights=on_s3(server))
        node.env["AWS_CA_BUNDLE"] = str(certificate)
        assert taken(node.bring(node.pin(on_s3(server)))) == files
    finally:
        server.kill()
    shutil.rmtree(node.home)
    with proxy_to(s3.url) as proxy:  # it goes to the store, whatever host it is asked for
        node.env |= {"HTTP_PROXY": proxy.url, "http_proxy": proxy.url, "NO_PROXY": ""}
        weights = Weights("s3://acme/model", endpoint_url="http://store.invalid")
        pin = node.pin(weights)
        assert taken(node.bring(pin)) == files and proxy.sent == pin.total
        node.env["http_proxy"] = node.env["HTTP_PROXY"] = "socks9://127.0.0.1:9"
        shutil.rmtree(node.home)
        assert "http_proxy='socks9://127.0.0.1:9' is of no use" in node.fails("bring", pin=pin)


def test_from_gcs(node: Node, buckets: Path) -> None:
    files = taken(make_model(buckets / "acme" / "a model", (2 * PART_BYTES + 1, MIB)))
    with gcs_server(buckets) as url:
        weights = Weights("gs://anonymous@acme/a model", endpoint_url=url)
        pin = node.pin(weights)
        assert all(file.version and "md5" in file.digests for file in pin.files)
        assert taken(node.bring(pin)) == files


def test_from_any_other_fsspec_address(node: Node, tmp_path: Path) -> None:
    files = taken(make_model(tmp_path / "model", (PART_BYTES + 1,)))
    weights = Weights(f"local://{tmp_path}/model")
    assert taken(node.bring(node.pin(weights))) == files
    assert "pip install adlfs" in node.fails("pin", weights=Weights("az://acme/model"))
    assert "nor an installed fsspec package knows xyz://" in node.fails("pin", weights=Weights("xyz://acme/model"))
    for package, source, extra in (("s3fs", "s3://acme/model", "s3"), ("gcsfs", "gs://acme/model", "gcs")):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')")
        node.env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        assert f"not installed: pip install 'llmrun[{extra}]'" in node.fails("pin", weights=Weights(source))


def test_from_the_hub(node: Node, hub: Hub, tmp_path: Path) -> None:
    hub.repos["acme/model"] = make_model(tmp_path / "main", (2 * PART_BYTES + 1,))
    hub.branches["acme/model"] = {"small": make_model(tmp_path / "small", (MIB,), seed=1)}
    hub.private.add("acme/model")
    node.env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    pin = node.pin(Weights("acme/model"))
    assert len(pin.revision) == 40 and all(file.digests for file in pin.files)
    assert taken(node.bring(pin)) == taken(tmp_path / "main")
    small = node.pin(Weights("hf://acme/model@small"))
    assert small.revision != pin.revision
    before = hub.sent
    assert taken(node.bring(small)) == taken(tmp_path / "small")
    # The tokenizer is the same in both revisions.
    assert hub.sent - before == small.total - len("{}" * 1000)
    assert node.pin(Weights(f"acme/model@{pin.revision}")).id == pin.id
    assert hub.leaked == []


def test_adapters_of_every_store(node: Node, hub: Hub, buckets: Path, s3: S3, tmp_path: Path) -> None:
    places = {name: make_adapter(buckets / "acme" / "adapters" / name, seed=seed) for seed, name in enumerate("ab")}
    s3.restart()
    hub.repos["acme/adapters"] = buckets / "acme" / "adapters"
    hub.repos["acme/legal"] = places["b"]
    node.env |= {"HF_ENDPOINT": hub.url}

    def found(weights: Weights) -> dict[str, tuple[str, dict[str, bytes]]]:
        """What is listed there, brought here: each one's pin, and its files."""
        listed = [Adapter.model_validate(item) for item in node.do("adapters", weights=weights)]
        return {adapter.name: (adapter.pin.id, taken(node.bring(adapter.pin) / adapter.folder)) for adapter in listed}

    wanted = {name: taken(place) for name, place in places.items()}
    with gcs_server(buckets) as url:
        sources = [on_s3(s3, "acme/adapters"), Weights("gs://anonymous@acme/adapters", endpoint_url=url)]
        sources += [Weights("acme/adapters"), Weights(str(buckets / "acme" / "adapters"))]
        ids = set()
        for weights in sources:
            here = found(weights)
            assert {name: files for name, (_, files) in here.items()} == wanted, weights
            ids |= {pin for pin, _ in here.values()}
    assert len(ids) == len(sources) * len(wanted), "no two places share a pin"
    assert found(Weights("acme/legal")).keys() == {"legal"}
    listed = [node.do("adapters", weights=weights) for weights in (*sources[:1], *sources[2:], Weights("acme/legal"))]
    assert [[item["rank"] for item in items] for items in listed] == [[8, 8]] * 3 + [[8]]
    ranks = {Adapter.model_validate(item).pin.id: 99 for item in listed[0]}
    again = node.do("adapters", weights=sources[0], ranks=ranks)
    assert [item["rank"] for item in again] == [99, 99], "what is known is not read again"


def test_many_adapters_of_one_bucket_are_one_listing_and_ranks_are_read_once(node: Node, buckets: Path) -> None:
    place = make_adapter(buckets / "acme" / "adapters" / "a0", seed=0, layers=1)
    for number in range(1, MANY):
        (buckets / "acme" / "adapters" / f"a{number}").mkdir()
        for file in place.iterdir():
            (buckets / "acme" / "adapters" / f"a{number}" / file.name).hardlink_to(file)
    node.env |= AWS
    ranks: dict[str, int] = {}
    with s3_server(buckets) as s3:
        for _ in range(10):  # what is not read within READ_S is read at the next listing
            complete = bool(ranks) and all(ranks.values())
            began = time.monotonic()
            listed = node.do("adapters", weights=on_s3(s3, "acme/adapters"), ranks=ranks)
            ranks = {Adapter.model_validate(item).pin.id: item["rank"] for item in listed}
            print(f"{len(listed)} adapters, {time.monotonic() - began:.1f} s, {sum(map(bool, ranks.values()))} ranks")
            if complete:
                break
    assert len(ranks) == MANY and set(ranks.values()) == {8}


def test_what_the_hub_refuses_is_said_with_what_to_do(node: Node, hub: Hub, tmp_path: Path) -> None:
    hub.repos |= {"acme/gated": make_model(tmp_path / "gated"), "acme/private": tmp_path / "gated"}
    hub.gated.add("acme/gated")
    hub.private.add("acme/private")
    node.env["HF_ENDPOINT"] = hub.url
    said = node.fails("pin", weights=Weights("acme/gated"))
    assert f"accept its licence at {hub.url}/acme/gated" in said and "set HF_TOKEN" in said
    assert "it is private" in (said := node.fails("pin", weights=Weights("acme/private"))) and "set HF_TOKEN" in said
    node.env["HF_TOKEN"] = "hf_other"
    assert "account of this HF_TOKEN" in node.fails("pin", weights=Weights("acme/gated"))
    node.env["HF_TOKEN"] = hub.token
    assert "no revision 'v9'" in node.fails("pin", weights=Weights("acme/gated@v9"))
    hub.hostile.append("../evil.json")
    assert "would leave its folder" in node.fails("pin", weights=Weights("acme/gated"))
    node.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    said = node.fails("pin", weights=Weights("acme/gated"))
    assert "cannot be asked" in said and "llmrun weights import DIR --as acme/gated" in said


def test_what_lies_in_the_hubs_cache_is_checked_and_used_there(node: Node, hub: Hub, tmp_path: Path) -> None:
    hub.repos["acme/model"] = make_model(tmp_path / "main", (2 * MIB, MIB))
    node.env["HF_ENDPOINT"] = hub.url
    script = "from huggingface_hub import snapshot_download; print(snapshot_download('acme/model'))"
    env = {**node.environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    snapshot = Path(done.stdout.strip())
    damaged = (snapshot / "model-1.safetensors").resolve()
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    hub.downloads.clear()
    pin = node.pin(Weights("acme/model"))
    folder = node.bring(pin)
    assert hub.downloads == ["model-1.safetensors"]
    assert (folder / "model-0.safetensors").resolve() == (snapshot / "model-0.safetensors").resolve()
    assert taken(folder) == taken(tmp_path / "main")
    # Without a network: what lies there is all there is.
    other = Node(tmp_path / "other", {"HF_HOME": str(node.home / "hf"), "HF_HUB_OFFLINE": "1"})
    damaged.write_bytes((tmp_path / "main" / "model-1.safetensors").read_bytes())
    found = other.pin(Weights("acme/model"))
    assert found.revision == pin.revision and taken(other.bring(found)) == taken(tmp_path / "main")
    assert "does not have it" in other.fails("pin", weights=Weights("acme/other"))
    other.close()


def test_one_repository_from_two_stores_lies_here_once(node: Node, hub: Hub, buckets: Path, proxy: Proxy) -> None:
    hub.repos["acme/model"] = make_model(buckets / "acme" / "model", (9 * MIB,))
    node.env["HF_ENDPOINT"] = hub.url
    node.bring(node.pin(Weights("acme/model")))
    folder = node.bring(node.pin(on_s3(proxy)))
    assert proxy.sent < MIB  # the small files: comparing them would take as long as fetching them
    assert len([b for b in (node.home / "weights" / "blobs").iterdir() if b.stat().st_size > MIB]) == 1
    assert taken(folder) == taken(buckets / "acme" / "model")


def test_the_last_import_of_a_name_is_what_it_means(node: Node, tmp_path: Path) -> None:
    weights = NodeWeights(Settings(home=node.home), "127.0.0.1")
    pins: list[Pin] = []
    for number in (0, 1, 0):
        folder = tmp_path / str(number)
        if not folder.exists():
            make_model(folder, (MIB,), seed=number)
        kept = [pin.id for pin in pins]
        pins.append(Pin.model_validate(node.do("import", folder=str(folder), weights=Weights("acme/model"), keep=kept)))
        found = weights.imported(Weights("hf://acme/model@main"))
        assert found and found[1].id == pins[-1].id
    assert pins[0].id == pins[2].id != pins[1].id
    assert node.fails("import", folder=str(tmp_path), weights=Weights("acme/x")).count("there is no config.json") == 1


def test_import_and_mirror(node: Node, buckets: Path, s3: S3, proxy: Proxy, tmp_path: Path) -> None:
    files = taken(make_model(tmp_path / "local", (2 * PART_BYTES + 1,)))
    pin = Pin.model_validate(node.do("import", folder=str(tmp_path / "local"), weights=Weights("acme/model")))
    assert pin.imported and taken(node.cache.folder(pin.id)) == files
    target = on_s3(proxy, "acme/mirrors/model")
    assert node.do("mirror", pin=pin, target=target) == {"sent": 3, "there": 0}
    assert taken(buckets / "acme" / "mirrors" / "model") == files | {
        MANIFEST: (buckets / "acme" / "mirrors" / "model" / MANIFEST).read_bytes()
    }
    assert node.do("mirror", pin=pin, target=target) == {"sent": 0, "there": 3}
    mirrored = node.pin(target)
    assert all("sha256" in file.digests for file in mirrored.files)
    proxy.sent = 0
    assert taken(node.bring(mirrored)) == files and proxy.sent == 0
    # A file that was replaced since is not taken for what it was.
    (buckets / "acme" / "mirrors" / "model" / "config.json").write_text('{"seed": 77}')
    s3.restart()
    changed = {file.name: file for file in node.pin(target).files}
    assert "sha256" not in changed["config.json"].digests and "sha256" in changed["model-0.safetensors"].digests


# Faults.


def large_model(buckets: Path, parts: int = 6) -> Path:
    """A model of one file in several parts."""
    return make_model(buckets / "acme" / "model", (parts * PART_BYTES,))


def test_a_server_that_dies_in_the_middle_and_comes_back(node: Node, buckets: Path, s3: S3, proxy: Proxy) -> None:
    files = taken(large_model(buckets))
    pin = node.pin(on_s3(proxy))
    proxy.fault = Fault(bytes_per_s=60 * MIB)
    work = node.start("bring", pin=pin)
    until(lambda: proxy.sent > 2 * PART_BYTES, 30, "some of it has come")
    s3.kill()
    asked = len(proxy.requests)
    until(lambda: len(proxy.requests) > asked + 10, 30, "it asks again and again")
    s3.start()
    assert "result" in node.end(work)
    assert taken(node.cache.folder(pin.id)) == files
    # What was on its way in buffers when it died came twice.
    assert proxy.sent < pin.total + 16 * MIB


def test_a_damaged_byte_is_found_and_fetched_again(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = taken(make_model(buckets / "acme" / "model", (2 * PART_BYTES + 1, MIB)))
    pin = node.pin(on_s3(proxy))
    proxy.fault = Fault(damage=1)
    assert taken(node.bring(pin)) == files and proxy.sent > pin.total
    shutil.rmtree(node.home)
    proxy.fault = Fault(damage=1000)
    said = node.fails("bring", pin=pin)
    assert "arrived damaged 2 times: its md5 is" in said and "upload it again" in said
    assert not node.cache.find(pin.id)


def test_an_etag_that_is_no_md5_is_not_taken_for_one(node: Node, buckets: Path, proxy: Proxy) -> None:
    make_model(buckets / "acme" / "model", (2 * PART_BYTES + 1, MIB))
    pin = node.pin(on_s3(proxy))
    files = [f.model_copy(update={"digests": {"md5": "0" * 32}}) for f in pin.files]
    assert "damaged" in node.fails("bring", pin=pin.model_copy(update={"files": tuple(files)}))
    proxy.fault = Fault(headers={"x-amz-server-side-encryption": "aws:kms"})
    folder = node.bring(pin.model_copy(update={"files": tuple(files)}))
    assert taken(folder) == taken(buckets / "acme" / "model")


def test_busy_servers_are_asked_again(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = taken(make_model(buckets / "acme" / "model", (2 * PART_BYTES + 1,)))
    pin = node.pin(on_s3(proxy))
    for status in (503, 429):
        proxy.fault = Fault(status=status, times=6, cut=2)
        assert taken(node.bring(pin)) == files
        assert proxy.fault.times == 0 and proxy.fault.cut == 0
        shutil.rmtree(node.home)


def test_a_killed_worker_leaves_no_half_file_and_the_next_one_goes_on(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = taken(large_model(buckets, 8))
    pin = node.pin(on_s3(proxy))
    proxy.fault = Fault(bytes_per_s=60 * MIB)
    work = node.start("bring", pin=pin)
    journal = node.home / "weights" / "partial"

    def parts() -> int:
        return sum(len(path.read_bytes().partition(b"\n")[2]) // 4 for path in journal.glob("*.parts"))

    until(lambda: parts() >= 2, 30, "two parts have come")
    work.kill()
    work.wait(10)
    have = parts()
    assert not node.cache.find(pin.id) and not (node.home / "weights" / "models").exists()
    time.sleep(0.5)  # what the proxy was sending then is not counted
    proxy.sent, proxy.fault = 0, Fault()
    assert taken(node.bring(pin)) == files and node.partial() == []
    assert proxy.sent <= pin.total - have * PART_BYTES


class Slow:
    """A reader that sends a piece at a time, until `stop`; then it refuses one more part for good."""

    name, unnamed = "a slow store", set[str]()

    def __init__(self, stop: int) -> None:
        self.left = stop
        self.lock = threading.Lock()

    def read(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """Pieces of ones."""
        for at in range(start, end, MIB):
            with self.lock:
                self.left -= 1
            if self.left < 0:
                raise WeightsError("gone")
            time.sleep(0.002)
            yield b"\1" * min(MIB, end - at)


def test_a_transfer_that_fails_notes_no_part_that_has_not_come(tmp_path: Path) -> None:
    file = File(name="x", size=12 * PART_BYTES)  # without a checksum: nothing else would find it
    done: list[dict[str, str]] = []

    def run(reader: Slow) -> None:
        job = Job(file, tmp_path / "x.data", [reader])
        Transfer([job], lambda count: None, lambda job, digests: done.append(digests)).run()

    with pytest.raises(WeightsError, match="gone"):
        run(Slow(stop=100))
    assert not done
    run(Slow(stop=10**6))
    whole = hashlib.sha256()
    for _ in range(12):
        whole.update(b"\1" * PART_BYTES)
    assert done == [{"sha256": whole.hexdigest()}]


def test_a_worker_ends_with_its_agent(node: Node, buckets: Path, proxy: Proxy) -> None:
    large_model(buckets)
    pin = node.pin(on_s3(proxy))
    proxy.fault = Fault(bytes_per_s=5 * MIB)
    work = node.start("bring", pin=pin)
    until(lambda: proxy.sent > 0, 30, "it works")
    assert work.stdin
    work.stdin.close()
    assert work.wait(5) == 1


def test_eight_processes_that_ask_at_once_make_one_download(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = taken(make_model(buckets / "acme" / "model", (3 * PART_BYTES, MIB)))
    pin = node.pin(on_s3(proxy))
    work = [node.start("bring", pin=pin) for _ in range(8)]
    folders = {node.end(process)["result"] for process in work}
    assert len(folders) == 1 and taken(Path(folders.pop())) == files
    assert proxy.sent == pin.total


def test_two_pins_that_share_a_large_file_fetch_it_once(node: Node, buckets: Path, proxy: Proxy) -> None:
    make_model(buckets / "acme" / "model", (3 * PART_BYTES,))
    shutil.copytree(buckets / "acme" / "model", buckets / "acme" / "other")
    (buckets / "acme" / "other" / "config.json").write_text('{"seed": 2}')
    pins = [node.pin(on_s3(proxy)), node.pin(on_s3(proxy, "acme/other"))]
    proxy.fault = Fault(bytes_per_s=60 * MIB)
    for process in [node.start("bring", pin=pin) for pin in pins]:
        assert "result" in node.end(process)
    assert proxy.sent < 3 * PART_BYTES + MIB and all(node.cache.find(pin.id) for pin in pins)


def test_no_room_is_said_before_anything_is_fetched(node: Node, buckets: Path, proxy: Proxy, tmp_path: Path) -> None:
    make_model(buckets / "acme" / "model", (2 * MIB,))
    make_model(buckets / "acme" / "other", (2 * MIB,), seed=1)
    node.env["LLMRUN_WEIGHTS_MAX_BYTES"] = str(3 * MIB)
    first, second = node.pin(on_s3(proxy)), node.pin(on_s3(proxy, "acme/other"))
    node.bring(first)
    sent = proxy.sent
    said = node.fails("bring", pin=second, keep=[first.id])
    assert f"needs {2 * MIB + 12:,} bytes" in said or "needs 2,0" in said
    assert "LLMRUN_WEIGHTS_MAX_BYTES=3,145,728" in said and proxy.sent == sent
    assert node.cache.find(first.id)
    node.bring(second)  # the first is not needed any more
    assert not node.cache.find(first.id) and node.cache.find(second.id)
    assert sum(blob.stat().st_size for blob in (node.home / "weights" / "blobs").iterdir()) < 3 * MIB


def on_a_small_disk(node: Node, size: int) -> tuple[str, ...]:
    """What goes before a worker's command, so that its home is a tmpfs of `size` bytes that only it sees."""
    node.home.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o size={size} none "{node.home}" && exec "$@"'
    return ("unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", script, "sh")


def test_a_full_disk(node: Node, buckets: Path, proxy: Proxy) -> None:
    large_model(buckets, 4)
    pin = node.pin(on_s3(proxy))
    said = node.fails("bring", *on_a_small_disk(node, 100 * MIB), pin=pin)
    assert f"needs {pin.total:,} bytes" in said and "bytes, but 3" in said and "LLMRUN_WEIGHTS_DIR" in said
    assert proxy.sent == 0
    proxy.fault = Fault(bytes_per_s=40 * MIB)
    work = node.start("bring", *on_a_small_disk(node, 180 * MIB), pin=pin)
    until(lambda: proxy.sent > PART_BYTES, 30, "some of it has come")
    inside = Path(f"/proc/{work.pid}/root{node.home}")
    with (inside / "filler").open("wb", buffering=0) as filler:
        written = 0
        while written < 150 * MIB:
            try:
                written += filler.write(bytes(MIB))
            except OSError:
                break
        seen = os.open(inside / "weights", os.O_RDONLY)
        word = node.end(work)
        left = [file for _, _, files in os.walk(f"/proc/self/fd/{seen}") for file in files]
        os.close(seen)
    assert "No space left on device; what had come was removed" in word["error"]
    assert left == []


def test_odd_names_and_three_thousand_files(node: Node, buckets: Path, s3: S3) -> None:
    folder = make_model(buckets / "acme" / "ein modell +ü%20#?")
    for number in range(3000):
        (folder / f"shard {number} é&=.json").write_text(str(number))
    pin = node.pin(on_s3(s3, "acme/ein modell +ü%20#?"))
    assert len(pin.files) == 3003
    assert taken(node.bring(pin)) == taken(folder)


def test_an_object_that_changes_under_the_sync(node: Node, buckets: Path, s3: S3, proxy: Proxy) -> None:
    large_model(buckets, 3)
    pin = node.pin(on_s3(proxy))
    with (buckets / "acme" / "model" / "model-0.safetensors").open("r+b") as file:
        file.write(b"another")
    s3.restart()
    assert "has changed at s3://acme/model since it was pinned: deploy again" in node.fails("bring", pin=pin)
    assert node.pin(on_s3(proxy)).id != pin.id
    with gcs_server(buckets) as url:
        weights = Weights("gs://anonymous@acme/model", endpoint_url=url)
        pin = node.pin(weights)
        shutil.rmtree(node.home)
        httpx_put(url, "acme", "model/config.json", b"{}")
        assert "replaced or removed since it was pinned" in node.fails("bring", pin=pin)


def httpx_put(url: str, bucket: str, name: str, data: bytes) -> None:
    """Replace an object of GCS."""
    import httpx

    target = f"{url}/upload/storage/v1/b/{bucket}/o"
    httpx.post(target, params={"uploadType": "media", "name": name}, content=data).raise_for_status()


def test_an_index_that_names_missing_shards(node: Node, buckets: Path, proxy: Proxy) -> None:
    folder = make_model(buckets / "acme" / "model")
    shards = {"a": "model-0.safetensors", "b": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    said = node.fails("bring", pin=node.pin(on_s3(proxy)))
    assert "it is not complete: model.safetensors.index.json names model-1.safetensors" in said
    assert proxy.sent == (folder / "model.safetensors.index.json").stat().st_size


def test_verify_finds_what_the_disk_has_lost(node: Node, buckets: Path, proxy: Proxy) -> None:
    make_model(buckets / "acme" / "model")
    pin = node.pin(on_s3(proxy))
    folder = node.bring(pin)
    assert node.do("verify", pin=pin) == []
    blob = (folder / "model-0.safetensors").resolve()
    stat = blob.stat()
    with blob.open("r+b") as file:
        file.write(b"?")
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert node.cache.find(pin.id)  # a wake looks at sizes and times only
    (wrong,) = node.do("verify", pin=pin)
    assert "model-0.safetensors is damaged: its md5 is" in wrong
    assert not node.cache.find(pin.id)
    assert taken(node.bring(pin)) == taken(buckets / "acme" / "model")


def test_what_was_not_safe_on_the_disk_when_the_machine_stopped_is_hashed_again(
    node: Node, buckets: Path, proxy: Proxy
) -> None:
    make_model(buckets / "acme" / "model")
    pin = node.pin(on_s3(proxy))
    folder = node.bring(pin)
    manifest = node.home / "weights" / "manifests" / f"{pin.id}.json"
    data = json.loads(manifest.read_text()) | {"boot": "another"}
    manifest.write_text(json.dumps(data))
    assert node.cache.find(pin.id) and json.loads(manifest.read_text())["boot"] == ""
    blob = (folder / "model-0.safetensors").resolve()
    stat = blob.stat()
    blob.write_bytes(bytes(stat.st_size))
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    manifest.write_text(json.dumps(data))
    assert not node.cache.find(pin.id)


def test_memory_is_bounded_whatever_the_size(node: Node, buckets: Path, s3: S3) -> None:
    folder = make_model(buckets / "acme" / "model", ())
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(900 * MIB)
    pin = node.pin(on_s3(s3))
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:]); "
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
    work = node.start("bring", sys.executable, "-c", script, pin=pin)
    assert work.stderr and work.stdout and work.stdin
    said = [work.stdout.readline() for _ in range(1)]
    while "free" not in said[-1]:
        said.append(work.stdout.readline())
    assert "result" in said[-2]
    work.stdin.close()
    peak = int(work.stderr.read()) * 1024
    assert work.wait(10) == 0
    assert peak < 300 * MIB


async def test_another_node_is_asked_before_the_store(
    node: Node, buckets: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = taken(make_model(buckets / "acme" / "model", (3 * PART_BYTES + 1, MIB)))
    first = NodeWeights(Settings(home=node.home), "127.0.0.1")
    env = node.environment
    pin = await first.pin(on_s3(s3), env)
    asked = [first.bring(pin, env, [], []) for _ in range(3)]
    assert len(set(await asyncio.gather(*asked))) == 1
    s3.kill()
    second = NodeWeights(Settings(home=tmp_path / "second"), "127.0.0.1")
    env = env | {"LLMRUN_HOME": str(tmp_path / "second")}
    peer = await first.peer()
    stranger = peer.model_copy(update={"token": "wrong"})
    gone = peer.model_copy(update={"url": "http://127.0.0.1:9"})
    assert taken(await second.bring(pin, env, [gone, stranger, peer], [])) == files
    (row,) = second.rows()
    assert (row.pin, row.bytes, row.files) == (pin.id, pin.total, 4)
    await first.close()
    await second.close()
