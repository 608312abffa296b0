"""Weights when something goes wrong: servers, disks, processes, sources that change meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun.errors import WeightsError
from llmrun.settings import Settings
from llmrun.weights import Weights
from llmrun_runtime.weights.node_weights import CacheInfo, NodeWeights
from llmrun_runtime.weights.pin import File
from llmrun_runtime.weights.transfer import PART_BYTES, Job, Transfer
from tests.support.cluster import until
from tests.support.servers import S3, Fault, Proxy, gcs_server
from tests.support.weights import MIB, Node, make_model, on_s3, taken


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


async def test_what_nodes_tell_of_their_caches(node: Node, buckets: Path, s3: S3) -> None:
    make_model(buckets / "acme" / "model", (MIB,))
    weights, env = NodeWeights(Settings(home=node.home), "127.0.0.1"), node.environment
    assert await weights.cache_facts() == CacheInfo(bytes=0, found=0, brought=0, failed=0)
    pin = await weights.pin(on_s3(s3), env)
    small = env | {"LLMRUN_WEIGHTS_MAX_BYTES": "1"}
    for found in await asyncio.gather(*(weights.bring(pin, small, [], []) for _ in range(2)), return_exceptions=True):
        assert isinstance(found, WeightsError)
    await asyncio.gather(*(weights.bring(pin, env, [], []) for _ in range(3)))
    assert await weights.cache_facts() == CacheInfo(bytes=pin.total, found=0, brought=1, failed=1)
    await weights.bring(pin, env, [], [])
    weights.found()
    assert await weights.remove([pin.id]) == pin.total
    assert await weights.cache_facts() == CacheInfo(bytes=0, found=2, brought=1, failed=1)
    await weights.close()
