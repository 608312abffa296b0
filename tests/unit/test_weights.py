"""Weights from real stores into a node's cache, through the worker process that a node agent sends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmrun.errors import WeightsError
from llmrun.settings import Settings
from llmrun.weights import Weights
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.node_weights import NodeWeights
from llmrun_runtime.weights.pin import MANIFEST, File, Pin, choose
from llmrun_runtime.weights.transfer import PART_BYTES
from tests.support.adapters import make_adapter
from tests.support.servers import AWS, S3, Hub, Proxy, gcs_server, proxy_to, s3_server
from tests.support.weights import MIB, Node, make_model, on_s3, taken

# `LLMRUN_TEST_ADAPTERS=10000` is the size of docs/performance.md.
MANY = int(os.environ.get("LLMRUN_TEST_ADAPTERS", "600"))


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
    ranks = {Adapter.model_validate(item).config_id: 99 for item in listed[0]}
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
            ranks = {Adapter.model_validate(item).config_id: item["rank"] for item in listed}
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
