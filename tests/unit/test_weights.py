"""Fetch weights from real stores into a node's cache, through the worker process of a node agent."""

from __future__ import annotations

import asyncio
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
from llmrun_runtime.weights.adapters import Adapter, AdapterListing
from llmrun_runtime.weights.node_weights import NodeWeights
from llmrun_runtime.weights.pin import MIRROR_MANIFEST, File, Pin, select_files
from llmrun_runtime.weights.stores.hub import HubStore
from llmrun_runtime.weights.tasks import ImportTask, ListAdaptersTask, MirrorTask
from llmrun_runtime.weights.transfer import PART_BYTES
from tests.support.adapters import make_adapter
from tests.support.servers import S3, Hub, Proxy, commit_of, gcs_server, s3_server
from tests.support.weights import MIB, Node, make_model, on_s3, read_files

# `LLMRUN_TEST_ADAPTERS=10000` is the size of docs/explanation/performance.md.
MANY = int(os.environ.get("LLMRUN_TEST_ADAPTERS", "600"))


# Selection of files.


def select(*names: str, **options: Any) -> list[str]:
    """Return the names of the selected files."""
    files = [File(name=name, size=1) for name in names]
    return [file.name for file in select_files(files, Weights("org/model", **options))]


def test_the_files_that_an_engine_needs_are_selected() -> None:
    needed = ("config.json", "tokenizer.model", "chat_template.jinja", "1_Pooling/config.json", "modeling_x.py")
    skipped = (
        "README.md",
        "original/a.safetensors",
        "onnx/model.onnx",
        "flax_model.msgpack",
        "tf_model.h5",
        ".gitattributes",
    )
    selected = select(*needed, *skipped, "model.safetensors", "pytorch_model.bin")
    assert selected == sorted([*needed, "model.safetensors"])
    assert select("config.json", "pytorch_model.bin", "training_args.bin") == ["config.json", "pytorch_model.bin"]
    assert select("params.json", "consolidated.safetensors") == ["consolidated.safetensors", "params.json"]
    both = ("config.json", "consolidated.safetensors", "model-1.safetensors")
    assert select(*both) == ["config.json", "model-1.safetensors"]
    assert select(*both, exclude=["model-*"]) == ["config.json", "consolidated.safetensors"]
    assert select("a/x.gguf", "b.txt", include=["*.gguf"]) == ["a/x.gguf"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no files found at that address"),
        (("notes.md",), "no file matches include="),
        (("a.safetensors",), "config.json not found"),
        (("config.json", "../evil.json"), "outside the folder"),
        (("config.json", "/etc/x.json"), "outside the folder"),
        (("config.json", "a//b.json"), "outside the folder"),
        (("config.json", "a\\..\\b.json"), "outside the folder"),
        (("config.json", "a\n.json"), "outside the folder"),
    ],
)
def test_a_source_without_a_model_or_with_a_file_outside_its_folder_is_refused(
    names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        select(*names)


# Fetching from each store.


def test_a_fetch_from_s3_downloads_each_byte_once(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = read_files(make_model(buckets / "acme" / "model", (3 * PART_BYTES + 5, MIB, 0)))
    pin = node.pin(on_s3(proxy))
    folder = node.fetch(pin)
    assert read_files(folder) == files and node.partial_files() == []
    assert proxy.sent == pin.total == sum(map(len, files.values()))
    requests = len(proxy.requests)
    assert node.fetch(pin) == folder and len(proxy.requests) == requests
    assert node.pin(on_s3(proxy)).id == pin.id
    ((manifest, _),) = node.cache.manifests()
    assert manifest.boot == "" and set(manifest.entries) == set(files)


def test_s3_works_without_credentials_and_refuses_wrong_ones(node: Node, buckets: Path, s3: S3) -> None:
    make_model(buckets / "acme" / "model")
    with s3_server(buckets, keys=False) as public:
        weights = Weights("s3://anonymous@acme/model", endpoint_url=public.url)
        assert "config.json" in os.listdir(node.fetch(node.pin(weights)))
    assert "address not found" in node.pin_error(on_s3(s3, "nowhere/x"))
    assert "no files found at that address" in node.pin_error(on_s3(s3, "acme/x"))
    node.env["AWS_SECRET_ACCESS_KEY"] = "another"
    error = node.pin_error(on_s3(s3))
    assert "access denied" in error and "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in error


def test_s3_over_tls_needs_the_servers_certificate(node: Node, buckets: Path, tmp_path: Path) -> None:
    files = read_files(make_model(buckets / "acme" / "model", (2 * PART_BYTES + 1,)))
    certificate, public = tmp_path / "certificate.pem", tmp_path / "public"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tests -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", certificate, "-out", public], check=True, capture_output=True)
    certificate.write_text(certificate.read_text() + public.read_text())
    server = S3(buckets, certificate=certificate)
    server.start()
    node.env["AWS_MAX_ATTEMPTS"] = "1"
    try:
        assert "SSL" in node.pin_error(on_s3(server))
        node.env["AWS_CA_BUNDLE"] = str(certificate)
        assert read_files(node.fetch(node.pin(on_s3(server)))) == files
    finally:
        server.kill()


def test_the_environments_proxy_is_used(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = read_files(make_model(buckets / "acme" / "model", (2 * PART_BYTES + 1,)))
    node.env |= {"HTTP_PROXY": proxy.url, "http_proxy": proxy.url, "NO_PROXY": ""}
    pin = node.pin(Weights("s3://acme/model", endpoint_url="http://store.invalid"))
    assert read_files(node.fetch(pin)) == files and proxy.sent == pin.total
    node.env["http_proxy"] = node.env["HTTP_PROXY"] = "socks9://127.0.0.1:9"
    shutil.rmtree(node.home)
    assert "invalid value http_proxy='socks9://127.0.0.1:9'" in node.fetch_error(pin)


def test_a_fetch_from_gcs(node: Node, buckets: Path) -> None:
    files = read_files(make_model(buckets / "acme" / "a model", (2 * PART_BYTES + 1, MIB)))
    with gcs_server(buckets) as url:
        weights = Weights("gs://anonymous@acme/a model", endpoint_url=url)
        pin = node.pin(weights)
        assert all(file.version and "md5" in file.digests for file in pin.files)
        assert read_files(node.fetch(pin)) == files


def test_a_fetch_from_any_other_fsspec_address(node: Node, tmp_path: Path) -> None:
    files = read_files(make_model(tmp_path / "model", (PART_BYTES + 1,)))
    weights = Weights(f"local://{tmp_path}/model")
    assert read_files(node.fetch(node.pin(weights))) == files
    assert "pip install adlfs" in node.pin_error(Weights("az://acme/model"))
    assert "xyz:// is not supported by llmrun or any installed" in node.pin_error(Weights("xyz://acme/model"))
    for package in ("s3fs", "gcsfs"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')")
    node.env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    for source, extra in (("s3://acme/model", "s3"), ("gs://acme/model", "gcs")):
        assert f"not installed: pip install 'llmrun[{extra}]'" in node.pin_error(Weights(source))


def test_a_fetch_from_the_hub(node: Node, hub: Hub, tmp_path: Path) -> None:
    hub.repos["acme/model"] = make_model(tmp_path / "main", (2 * PART_BYTES + 1,))
    hub.branches["acme/model"] = {"small": make_model(tmp_path / "small", (MIB,), seed=1)}
    hub.private.add("acme/model")
    node.env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    pin = node.pin(Weights("acme/model"))
    assert len(pin.revision) == 40 and all(file.digests for file in pin.files)
    assert read_files(node.fetch(pin)) == read_files(tmp_path / "main")
    small = node.pin(Weights("hf://acme/model@small"))
    assert small.revision != pin.revision
    before = hub.sent
    assert read_files(node.fetch(small)) == read_files(tmp_path / "small")
    # The tokenizer is the same in both revisions.
    assert hub.sent - before == small.total - len("{}" * 1000)
    assert node.pin(Weights(f"acme/model@{pin.revision}")).id == pin.id
    assert hub.leaked == []


def list_adapters(node: Node, weights: Weights, known_ranks: dict[str, int] | None = None) -> list[Adapter]:
    """List a source's adapters; reads all ranks but the known ones."""
    task = ListAdaptersTask(weights=weights, known_ranks=known_ranks or {})
    return list(AdapterListing.model_validate(node.run(task)).adapters or ())


def test_a_nodes_token_goes_to_no_endpoint_that_an_app_names(node: Node, hub: Hub, tmp_path: Path) -> None:
    hub.repos["acme/model"] = make_model(tmp_path / "model")
    hub.private.add("acme/model")
    node.env |= {"HF_TOKEN": hub.token}
    named = Weights("acme/model", endpoint_url=hub.url)
    with pytest.raises(AssertionError, match="a node's own does not go to endpoint_url="):
        node.pin(named)
    node.env |= {"LLMRUN_MODEL_VARIABLES": "A,HF_TOKEN"}  # env= gives it to this model
    assert node.pin(named).files
    del node.env["LLMRUN_MODEL_VARIABLES"]
    node.env |= {"HF_ENDPOINT": hub.url}
    assert node.pin(Weights("acme/model")).files


def test_a_stranger_chooses_only_revisions_that_the_owner_published(node: Node, hub: Hub, tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(["main", "v1", "proposed"])]
    main, branch, proposed = folders
    hub.repos["acme/legal"], hub.branches["acme/legal"] = main, {"v1": branch}
    hub.proposed["acme/legal"] = [proposed]
    node.env |= {"HF_ENDPOINT": hub.url}
    source = f"acme/legal@{commit_of(proposed)}"
    assert list_adapters(node, Weights(source)), "the Hub serves it"

    def chosen(revision: str) -> list[Adapter]:
        task = ListAdaptersTask(weights=Weights(f"acme/legal@{revision}"), known_ranks={}, published=True)
        return list(AdapterListing.model_validate(node.run(task)).adapters or ())

    for revision in ("main", "v1", commit_of(main), commit_of(branch)):
        assert len(chosen(revision)) == 1
    with pytest.raises(AssertionError, match=r"is not a branch or tag of acme/legal, nor a commit of one"):
        chosen(commit_of(proposed))
    hub.earlier["acme/legal"] = [commit_of(proposed)]  # it was accepted
    assert len(chosen(commit_of(proposed))) == 1
    hub.private.add("acme/legal")
    with pytest.raises(AssertionError, match="cannot list the branches of acme/legal"):
        chosen("main")


def test_adapters_are_listed_and_fetched_from_every_store(
    node: Node, hub: Hub, buckets: Path, s3: S3, tmp_path: Path
) -> None:
    folders = {name: make_adapter(buckets / "acme" / "adapters" / name, seed=seed) for seed, name in enumerate("ab")}
    s3.restart()
    hub.repos["acme/adapters"] = buckets / "acme" / "adapters"
    hub.repos["acme/legal"] = folders["b"]
    node.env |= {"HF_ENDPOINT": hub.url}
    expected = {name: read_files(folder) for name, folder in folders.items()}
    with gcs_server(buckets) as url:
        sources = [on_s3(s3, "acme/adapters"), Weights("gs://anonymous@acme/adapters", endpoint_url=url)]
        sources += [Weights("acme/adapters"), Weights(str(buckets / "acme" / "adapters"))]
        pin_ids = set()
        for weights in sources:
            adapters = list_adapters(node, weights)
            fetched = {adapter.name: read_files(node.fetch(adapter.pin) / adapter.folder) for adapter in adapters}
            assert fetched == expected, weights
            pin_ids |= {adapter.pin.id for adapter in adapters}
    assert len(pin_ids) == len(sources) * len(expected), "no two sources share a pin"
    (legal,) = list_adapters(node, Weights("acme/legal"))
    assert legal.name == "legal" and read_files(node.fetch(legal.pin) / legal.folder) == expected["b"]


def test_ranks_are_read_from_every_store_unless_they_are_known(node: Node, hub: Hub, buckets: Path, s3: S3) -> None:
    for seed, name in enumerate("ab"):
        make_adapter(buckets / "acme" / "adapters" / name, seed=seed)
    hub.repos["acme/adapters"] = buckets / "acme" / "adapters"
    hub.repos["acme/legal"] = buckets / "acme" / "adapters" / "b"
    node.env |= {"HF_ENDPOINT": hub.url}
    bucket = on_s3(s3, "acme/adapters")
    sources = [bucket, Weights("acme/adapters"), Weights(str(buckets / "acme" / "adapters")), Weights("acme/legal")]
    listed = [list_adapters(node, weights) for weights in sources]
    assert [[adapter.rank for adapter in adapters] for adapters in listed] == [[8, 8]] * 3 + [[8]]
    known = {adapter.config_id: 99 for adapter in listed[0]}
    assert [adapter.rank for adapter in list_adapters(node, bucket, known)] == [99, 99], "known ranks are not read"


def test_a_listing_that_is_known_is_not_sent_again(node: Node, buckets: Path) -> None:
    for seed, name in enumerate("ab"):
        make_adapter(buckets / "acme" / "adapters" / name, seed=seed)
    source = Weights(str(buckets / "acme" / "adapters"))

    def listing(known: str) -> AdapterListing:
        return AdapterListing.model_validate(node.run(ListAdaptersTask(weights=source, known_ranks=None, known=known)))

    first = listing("")
    assert first.adapters and listing(first.digest) == AdapterListing(digest=first.digest)
    make_adapter(buckets / "acme" / "adapters" / "c", seed=2)
    changed = listing(first.digest)
    assert changed.adapters and len(changed.adapters) == 3 and changed.digest != first.digest


def test_many_adapters_in_one_bucket_need_one_listing_and_each_rank_is_read_once(node: Node, buckets: Path) -> None:
    folder = make_adapter(buckets / "acme" / "adapters" / "a0", seed=0, layers=1)
    for number in range(1, MANY):
        (buckets / "acme" / "adapters" / f"a{number}").mkdir()
        for file in folder.iterdir():
            (buckets / "acme" / "adapters" / f"a{number}" / file.name).hardlink_to(file)
    ranks: dict[str, int] = {}
    with s3_server(buckets) as s3:
        for _ in range(10):  # the next listing reads the ranks that READ_TIMEOUT_S left out
            complete = bool(ranks) and all(ranks.values())
            started = time.monotonic()
            adapters = list_adapters(node, on_s3(s3, "acme/adapters"), ranks)
            ranks = {adapter.config_id: adapter.rank for adapter in adapters}
            seconds = time.monotonic() - started
            print(f"{len(adapters)} adapters, {seconds:.1f} s, {sum(map(bool, ranks.values()))} ranks")
            if complete:
                break
    assert len(ranks) == MANY and set(ranks.values()) == {8}


def test_the_hubs_refusals_are_explained(node: Node, hub: Hub, tmp_path: Path) -> None:
    hub.repos |= {"acme/gated": make_model(tmp_path / "gated"), "acme/private": tmp_path / "gated"}
    hub.gated.add("acme/gated")
    hub.private.add("acme/private")
    node.env["HF_ENDPOINT"] = hub.url
    error = node.pin_error(Weights("acme/gated"))
    assert f"accept its licence at {hub.url}/acme/gated" in error and "set HF_TOKEN" in error
    error = node.pin_error(Weights("acme/private"))
    assert "it is private" in error and "set HF_TOKEN" in error
    node.env["HF_TOKEN"] = "hf_other"
    assert "account of this HF_TOKEN" in node.pin_error(Weights("acme/gated"))
    node.env["HF_TOKEN"] = hub.token
    assert "no revision 'v9'" in node.pin_error(Weights("acme/gated@v9"))
    hub.hostile.append("../evil.json")
    assert "outside the folder" in node.pin_error(Weights("acme/gated"))


def test_an_unreachable_hub_is_retried_and_the_error_names_ways_without_a_network() -> None:
    store = HubStore(Weights("acme/gated", endpoint_url="http://127.0.0.1:9"), 1, retry_waits_s=(0, 0))
    with pytest.raises(WeightsError, match=r"cannot reach the Hub at http://127\.0\.0\.1:9") as raised:
        store.pin()
    assert "llmrun weights import DIR --as acme/gated" in str(raised.value)


def test_files_in_the_hubs_cache_are_checked_and_used_in_place(node: Node, hub: Hub, tmp_path: Path) -> None:
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
    folder = node.fetch(pin)
    assert hub.downloads == ["model-1.safetensors"]
    assert (folder / "model-0.safetensors").resolve() == (snapshot / "model-0.safetensors").resolve()
    assert read_files(folder) == read_files(tmp_path / "main")
    # Without a network, the Hub's cache is the only source.
    other = Node(tmp_path / "other", {"HF_HOME": str(node.home / "hf"), "HF_HUB_OFFLINE": "1"})
    damaged.write_bytes((tmp_path / "main" / "model-1.safetensors").read_bytes())
    offline = other.pin(Weights("acme/model"))
    assert offline.revision == pin.revision and read_files(other.fetch(offline)) == read_files(tmp_path / "main")
    assert "and HF_HUB_OFFLINE is set" in other.pin_error(Weights("acme/other"))
    other.close()


def test_one_repository_from_two_stores_is_stored_once(node: Node, hub: Hub, buckets: Path, proxy: Proxy) -> None:
    hub.repos["acme/model"] = make_model(buckets / "acme" / "model", (9 * MIB,))
    node.env["HF_ENDPOINT"] = hub.url
    node.fetch(node.pin(Weights("acme/model")))
    folder = node.fetch(node.pin(on_s3(proxy)))
    assert proxy.sent < MIB  # the small files: comparing them takes as long as a download
    assert len([b for b in (node.home / "weights" / "blobs").iterdir() if b.stat().st_size > MIB]) == 1
    assert read_files(folder) == read_files(buckets / "acme" / "model")


def import_folder(node: Node, folder: Path, keep: tuple[str, ...] = ()) -> Pin:
    """Import a folder as `acme/model`."""
    task = ImportTask(folder=str(folder), weights=Weights("acme/model"), keep=keep)
    return Pin.model_validate(node.run(task))


def test_a_name_means_its_last_import(node: Node, tmp_path: Path) -> None:
    weights = NodeWeights(Settings(home=node.home), "127.0.0.1")
    pins: list[Pin] = []
    for number in (0, 1, 0):
        folder = tmp_path / str(number)
        if not folder.exists():
            make_model(folder, (MIB,), seed=number)
        pins.append(import_folder(node, folder, tuple(pin.id for pin in pins)))
        last = asyncio.run(weights.last_import(Weights("hf://acme/model@main")))
        assert last and last[1].id == pins[-1].id
    assert pins[0].id == pins[2].id != pins[1].id
    error = node.error(ImportTask(folder=str(tmp_path), weights=Weights("acme/x")))
    assert error.count("config.json not found") == 1


def test_an_import_and_its_mirror(node: Node, buckets: Path, s3: S3, proxy: Proxy, tmp_path: Path) -> None:
    files = read_files(make_model(tmp_path / "local", (2 * PART_BYTES + 1,)))
    pin = import_folder(node, tmp_path / "local")
    assert pin.imported and read_files(node.cache.folder(pin.id)) == files
    target = on_s3(proxy, "acme/mirrors/model")
    mirror = MirrorTask(pin=pin, target=target)
    assert node.run(mirror) == {"uploaded": 3, "unchanged": 0}
    assert read_files(buckets / "acme" / "mirrors" / "model") == files | {
        MIRROR_MANIFEST: (buckets / "acme" / "mirrors" / "model" / MIRROR_MANIFEST).read_bytes()
    }
    assert node.run(mirror) == {"uploaded": 0, "unchanged": 3}
    mirrored = node.pin(target)
    assert all("sha256" in file.digests for file in mirrored.files)
    proxy.sent = 0
    assert read_files(node.fetch(mirrored)) == files and proxy.sent == 0
    # A file that was replaced after the upload loses its recorded checksum.
    (buckets / "acme" / "mirrors" / "model" / "config.json").write_text('{"seed": 77}')
    s3.restart()
    changed = {file.name: file for file in node.pin(target).files}
    assert "sha256" not in changed["config.json"].digests and "sha256" in changed["model-0.safetensors"].digests
