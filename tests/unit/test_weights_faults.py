"""Weights when something fails: servers, disks and processes, and sources that change during a fetch."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from llmrun.errors import WeightsError
from llmrun.settings import Settings
from llmrun.weights import Weights
from llmrun_runtime.weights.fetch import Fetcher
from llmrun_runtime.weights.node_weights import CacheInfo, NodeWeights
from llmrun_runtime.weights.pin import File
from llmrun_runtime.weights.stores.ranges import TransferError
from llmrun_runtime.weights.tasks import FetchTask, VerifyTask
from llmrun_runtime.weights.transfer import PART_BYTES, FileDownload, RetryPolicy, Transfer
from tests.support.cluster import until
from tests.support.servers import AWS, S3, Fault, Proxy, gcs_server
from tests.support.weights import MIB, Node, make_model, on_s3, read_files, write_safetensors


def large_model(buckets: Path, parts: int = 6) -> Path:
    """Make a model of one file in several parts."""
    return make_model(buckets / "acme" / "model", (parts * PART_BYTES,))


def test_a_fetch_survives_a_restart_of_the_server(
    node: Node, buckets: Path, s3: S3, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = read_files(large_model(buckets))
    pin = node.pin(on_s3(proxy))
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    proxy.fault = Fault(bytes_per_s=60 * MIB)
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(Fetcher(node.cache, pin, retries=RetryPolicy(longest_wait_s=0.4)).run)
        until(lambda: proxy.sent > 2 * PART_BYTES, 30, "some parts have arrived")
        s3.kill()
        requests = len(proxy.requests)
        until(lambda: len(proxy.requests) > requests + 10, 30, "it retries")
        s3.start()
        fetch.result(60)
    assert read_files(node.cache.folder(pin.id)) == files
    # The bytes in buffers when the server died were sent twice.
    assert proxy.sent < pin.total + 16 * MIB


def test_a_damaged_byte_is_detected_and_fetched_again(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = read_files(make_model(buckets / "acme" / "model", (2 * PART_BYTES + 1, MIB)))
    pin = node.pin(on_s3(proxy))
    proxy.fault = Fault(damage=1)
    assert read_files(node.fetch(pin)) == files and proxy.sent > pin.total
    shutil.rmtree(node.home)
    proxy.fault = Fault(damage=1000)
    error = node.fetch_error(pin)
    assert "arrived damaged 2 times: its md5 is" in error and "Upload the file again" in error
    assert not node.cache.find(pin.id)


def test_an_etag_that_is_not_an_md5_is_not_compared(node: Node, buckets: Path, proxy: Proxy) -> None:
    make_model(buckets / "acme" / "model", (2 * PART_BYTES + 1, MIB))
    pin = node.pin(on_s3(proxy))
    files = [f.model_copy(update={"digests": {"md5": "0" * 32}}) for f in pin.files]
    assert "damaged" in node.fetch_error(pin.model_copy(update={"files": tuple(files)}))
    proxy.fault = Fault(headers={"x-amz-server-side-encryption": "aws:kms"})
    folder = node.fetch(pin.model_copy(update={"files": tuple(files)}))
    assert read_files(folder) == read_files(buckets / "acme" / "model")


@pytest.mark.parametrize("status", [503, 429])
def test_requests_to_a_busy_server_are_retried(node: Node, buckets: Path, proxy: Proxy, status: int) -> None:
    files = read_files(make_model(buckets / "acme" / "model", (2 * PART_BYTES + 1,)))
    pin = node.pin(on_s3(proxy))
    proxy.fault = Fault(status=status, times=3, cut=2)
    assert read_files(node.fetch(pin)) == files
    assert proxy.fault.times == 0 and proxy.fault.cut == 0


def test_the_fetch_after_a_killed_worker_resumes(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = read_files(large_model(buckets))
    pin = node.pin(on_s3(proxy))
    proxy.fault = Fault(bytes_per_s=60 * MIB)
    worker = node.start(FetchTask(pin=pin))
    journal = node.home / "weights" / "partial"

    def parts() -> int:
        return sum(len(path.read_bytes().partition(b"\n")[2]) // 4 for path in journal.glob("*.parts"))

    until(lambda: parts() >= 2, 30, "two parts have arrived")
    worker.kill()
    worker.wait(10)
    have = parts()
    assert not node.cache.find(pin.id) and not (node.home / "weights" / "models").exists()
    until(lambda: not proxy.connections, 10, "the proxy has closed the worker's connections")
    proxy.sent, proxy.fault = 0, Fault()
    assert read_files(node.fetch(pin)) == files and node.partial_files() == []
    assert proxy.sent <= pin.total - have * PART_BYTES


class SlowReader:
    """Sends a chunk at a time; after `chunks` of them, it refuses one more part for good."""

    name, not_md5 = "a slow store", set[str]()

    def __init__(self, chunks: int) -> None:
        self.left = chunks
        self.lock = threading.Lock()

    def read(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """Yield chunks of ones."""
        for at in range(start, end, MIB):
            with self.lock:
                self.left -= 1
            if self.left < 0:
                raise WeightsError("refused")
            time.sleep(0.002)
            yield b"\1" * min(MIB, end - at)


def test_a_failed_transfer_records_no_part_that_has_not_arrived(tmp_path: Path) -> None:
    file = File(name="x", size=12 * PART_BYTES)  # without a checksum: nothing else would detect it
    done: list[dict[str, str]] = []

    def run(reader: SlowReader) -> None:
        download = FileDownload(file, tmp_path / "x.data", [reader])
        Transfer([download], lambda count: None, lambda download, digests: done.append(digests)).run()

    with pytest.raises(WeightsError, match="refused"):
        run(SlowReader(chunks=100))
    assert not done
    run(SlowReader(chunks=10**6))
    whole = hashlib.sha256()
    for _ in range(12):
        whole.update(b"\1" * PART_BYTES)
    assert done == [{"sha256": whole.hexdigest()}]


class SilentReader:
    """Never sends a byte."""

    name, not_md5 = "a silent store", set[str]()

    def read(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """Raise TransferError."""
        raise TransferError("no response")


def test_a_transfer_without_data_times_out(tmp_path: Path) -> None:
    download = FileDownload(File(name="x", size=MIB), tmp_path / "x.data", [SilentReader()])
    retries = RetryPolicy(first_wait_s=0.01, stall_timeout_s=0.1)
    with pytest.raises(WeightsError, match=r"x from a silent store timed out after 0\.1 s without data: no response"):
        Transfer([download], lambda count: None, lambda download, digests: None, retries).run()


def test_a_worker_exits_with_its_agent(node: Node, buckets: Path, proxy: Proxy) -> None:
    large_model(buckets)
    pin = node.pin(on_s3(proxy))
    proxy.fault = Fault(bytes_per_s=5 * MIB)
    worker = node.start(FetchTask(pin=pin))
    until(lambda: proxy.sent > 0, 30, "the fetch has started")
    assert worker.stdin
    worker.stdin.close()
    assert worker.wait(5) == 1


def test_concurrent_fetches_of_eight_processes_download_once(node: Node, buckets: Path, proxy: Proxy) -> None:
    files = read_files(make_model(buckets / "acme" / "model", (3 * PART_BYTES, MIB)))
    pin = node.pin(on_s3(proxy))
    workers = [node.start(FetchTask(pin=pin)) for _ in range(8)]
    folders = {node.wait(worker)["result"] for worker in workers}
    assert len(folders) == 1 and read_files(Path(folders.pop())) == files
    assert proxy.sent == pin.total


def test_a_large_file_of_two_pins_is_downloaded_once(node: Node, buckets: Path, proxy: Proxy) -> None:
    make_model(buckets / "acme" / "model", (3 * PART_BYTES,))
    shutil.copytree(buckets / "acme" / "model", buckets / "acme" / "other")
    (buckets / "acme" / "other" / "config.json").write_text('{"seed": 2}')
    pins = [node.pin(on_s3(proxy)), node.pin(on_s3(proxy, "acme/other"))]
    proxy.fault = Fault(bytes_per_s=60 * MIB)
    for worker in [node.start(FetchTask(pin=pin)) for pin in pins]:
        assert "result" in node.wait(worker)
    assert proxy.sent < 3 * PART_BYTES + MIB and all(node.cache.find(pin.id) for pin in pins)


def test_a_file_that_arrives_before_the_lock_is_taken_is_reused(
    node: Node, buckets: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(buckets / "acme" / "model", (2 * PART_BYTES,))
    shutil.copytree(buckets / "acme" / "model", buckets / "acme" / "other")
    (buckets / "acme" / "other" / "config.json").write_text('{"seed": 2}')
    first, second = node.pin(on_s3(proxy)), node.pin(on_s3(proxy, "acme/other"))
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    readers = Fetcher._readers

    def fetch_first(fetcher: Fetcher) -> object:
        node.fetch(first)  # after the second fetch has looked for local files
        return readers(fetcher)

    monkeypatch.setattr(Fetcher, "_readers", fetch_first)
    Fetcher(node.cache, second).run()
    assert proxy.sent < 2 * PART_BYTES + MIB and node.cache.find(second.id)


def test_a_full_cache_is_reported_before_a_download_and_unused_pins_are_evicted(
    node: Node, buckets: Path, proxy: Proxy
) -> None:
    make_model(buckets / "acme" / "model", (2 * MIB,))
    make_model(buckets / "acme" / "other", (2 * MIB,), seed=1)
    node.env["LLMRUN_WEIGHTS_MAX_BYTES"] = str(3 * MIB)
    first, second = node.pin(on_s3(proxy)), node.pin(on_s3(proxy, "acme/other"))
    node.fetch(first)
    sent = proxy.sent
    error = node.fetch_error(second, keep=(first.id,))
    assert f"needs {2 * MIB + 12:,} bytes" in error or "needs 2,0" in error
    assert "LLMRUN_WEIGHTS_MAX_BYTES=3,145,728" in error and proxy.sent == sent
    assert node.cache.find(first.id)
    node.fetch(second)  # the first may be evicted now
    assert not node.cache.find(first.id) and node.cache.find(second.id)
    assert sum(blob.stat().st_size for blob in (node.home / "weights" / "blobs").iterdir()) < 3 * MIB


def on_a_small_disk(node: Node, size: int) -> tuple[str, ...]:
    """A prefix for a worker's command: its home is then a tmpfs of `size` bytes that only the worker sees."""
    node.home.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o size={size} none "{node.home}" && exec "$@"'
    return ("unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", script, "sh")


def test_a_disk_that_is_too_small_is_reported_before_a_download(node: Node, buckets: Path, proxy: Proxy) -> None:
    large_model(buckets, 4)
    pin = node.pin(on_s3(proxy))
    error = node.fetch_error(pin, *on_a_small_disk(node, 100 * MIB))
    assert f"needs {pin.total:,} bytes, 3" in error and "LLMRUN_WEIGHTS_DIR" in error
    assert proxy.sent == 0


def test_a_disk_that_fills_up_during_a_download_keeps_no_partial_file(node: Node, buckets: Path, proxy: Proxy) -> None:
    large_model(buckets, 4)
    pin = node.pin(on_s3(proxy))
    proxy.fault = Fault(bytes_per_s=40 * MIB)
    worker = node.start(FetchTask(pin=pin), *on_a_small_disk(node, 180 * MIB))
    until(lambda: proxy.sent > PART_BYTES, 30, "some of it has arrived")
    inside = Path(f"/proc/{worker.pid}/root{node.home}")
    with (inside / "filler").open("wb", buffering=0) as filler:
        written = 0
        while written < 150 * MIB:
            try:
                written += filler.write(bytes(MIB))
            except OSError:
                break
        folder = os.open(inside / "weights", os.O_RDONLY)
        message = node.wait(worker)
        left = [file for _, _, files in os.walk(f"/proc/self/fd/{folder}") for file in files]
        os.close(folder)
    assert "No space left on device. The partial download was removed" in message["error"]
    assert left == []


def test_unusual_names_and_more_files_than_one_page_of_a_listing(node: Node, buckets: Path, s3: S3) -> None:
    folder = make_model(buckets / "acme" / "ein modell +ü%20#?")
    for number in range(1100):  # S3 lists 1,000 per page
        (folder / f"shard {number} é&=.json").write_text(str(number))
    pin = node.pin(on_s3(s3, "acme/ein modell +ü%20#?"))
    assert len(pin.files) == 1103
    assert read_files(node.fetch(pin)) == read_files(folder)


def test_an_object_that_changes_after_it_was_pinned_is_refused(node: Node, buckets: Path, s3: S3, proxy: Proxy) -> None:
    large_model(buckets, 3)
    pin = node.pin(on_s3(proxy))
    with (buckets / "acme" / "model" / "model-0.safetensors").open("r+b") as file:
        file.write(b"another")
    s3.restart()
    assert "has changed at s3://acme/model since it was pinned: deploy again" in node.fetch_error(pin)
    assert node.pin(on_s3(proxy)).id != pin.id


def test_a_gcs_object_that_was_replaced_after_it_was_pinned_is_refused(node: Node, buckets: Path) -> None:
    make_model(buckets / "acme" / "model")
    with gcs_server(buckets) as url:
        pin = node.pin(Weights("gs://anonymous@acme/model", endpoint_url=url))
        upload, params = f"{url}/upload/storage/v1/b/acme/o", {"uploadType": "media", "name": "model/config.json"}
        httpx.post(upload, params=params, content=b"{}").raise_for_status()
        assert "replaced or removed since it was pinned" in node.fetch_error(pin)


def test_an_index_that_names_missing_shards_fails_before_the_download(node: Node, buckets: Path, proxy: Proxy) -> None:
    folder = make_model(buckets / "acme" / "model")
    shards = {"a": "model-0.safetensors", "b": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    error = node.fetch_error(node.pin(on_s3(proxy)))
    assert "incomplete: model.safetensors.index.json names model-1.safetensors" in error
    assert proxy.sent == (folder / "model.safetensors.index.json").stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "model-1.safetensors is damaged at its source: it has 1572864 bytes, expected 3145728. Upload it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "model-1.safetensors is damaged at its source: it has no"),
    ],
)
def test_a_shard_that_was_cut_off_at_its_source_is_named(
    node: Node, buckets: Path, proxy: Proxy, content: bytes | None, message: str
) -> None:
    shard = make_model(buckets / "acme" / "model", (3 * MIB, 3 * MIB)) / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[: 3 * MIB // 2] if content is None else content)
    assert message in node.fetch_error(node.pin(on_s3(proxy)))


def test_verify_detects_damage_on_disk(node: Node, buckets: Path, proxy: Proxy) -> None:
    make_model(buckets / "acme" / "model")
    pin = node.pin(on_s3(proxy))
    folder = node.fetch(pin)
    assert node.run(VerifyTask(pin=pin)) == []
    blob = (folder / "model-0.safetensors").resolve()
    stat = blob.stat()
    with blob.open("r+b") as file:
        file.write(b"?")
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert node.cache.find(pin.id)  # a cold start compares sizes and mtimes only
    (problem,) = node.run(VerifyTask(pin=pin))
    assert "model-0.safetensors is damaged: its md5 is" in problem
    assert not node.cache.find(pin.id)
    assert read_files(node.fetch(pin)) == read_files(buckets / "acme" / "model")


def test_files_that_were_not_synced_before_a_reboot_are_hashed_again(node: Node, buckets: Path, proxy: Proxy) -> None:
    make_model(buckets / "acme" / "model")
    pin = node.pin(on_s3(proxy))
    folder = node.fetch(pin)
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


def test_a_workers_memory_does_not_grow_with_the_model(node: Node, buckets: Path, s3: S3) -> None:
    folder = make_model(buckets / "acme" / "model", ())
    write_safetensors(folder / "model.safetensors", 360 * MIB)
    pin = node.pin(on_s3(s3))
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:]); "
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
    worker = node.start(FetchTask(pin=pin), sys.executable, "-c", script)
    assert "result" in node.wait(worker)
    assert worker.stderr and worker.stdin
    worker.stdin.close()
    peak = int(worker.stderr.read()) * 1024
    assert worker.wait(10) == 0
    assert peak < 300 * MIB


async def test_another_node_is_preferred_to_the_store(node: Node, buckets: Path, s3: S3, tmp_path: Path) -> None:
    files = read_files(make_model(buckets / "acme" / "model", (3 * PART_BYTES + 1, MIB)))
    first = NodeWeights(Settings(home=node.home), "127.0.0.1")
    env = node.environment
    pin = await first.pin(on_s3(s3), env)
    fetches = [first.fetch(pin, env, [], []) for _ in range(3)]
    assert len(set(await asyncio.gather(*fetches))) == 1
    s3.kill()
    second = NodeWeights(Settings(home=tmp_path / "second"), "127.0.0.1")
    env = env | {"LLMRUN_HOME": str(tmp_path / "second")}
    peer = await first.serve_peers()
    unauthorized = peer.model_copy(update={"token": "wrong"})
    unreachable = peer.model_copy(update={"url": "http://127.0.0.1:9"})
    assert read_files(await second.fetch(pin, env, [unreachable, unauthorized, peer], [])) == files
    (row,) = await second.list_weights()
    assert (row.pin, row.bytes, row.files) == (pin.id, pin.total, 4)
    await first.close()
    await second.close()


async def test_a_node_counts_cache_hits_fetches_and_failures(node: Node, buckets: Path, s3: S3) -> None:
    make_model(buckets / "acme" / "model", (MIB,))
    weights, env = NodeWeights(Settings(home=node.home), "127.0.0.1"), node.environment
    assert await weights.cache_info() == CacheInfo(bytes=0, found=0, fetched=0, failed=0)
    pin = await weights.pin(on_s3(s3), env)
    small = env | {"LLMRUN_WEIGHTS_MAX_BYTES": "1"}
    for result in await asyncio.gather(*(weights.fetch(pin, small, [], []) for _ in range(2)), return_exceptions=True):
        assert isinstance(result, WeightsError)
    await asyncio.gather(*(weights.fetch(pin, env, [], []) for _ in range(3)))
    assert await weights.cache_info() == CacheInfo(bytes=pin.total, found=0, fetched=1, failed=1)
    await weights.fetch(pin, env, [], [])
    weights.count_cache_hit()
    assert await weights.remove([pin.id]) == pin.total
    assert await weights.cache_info() == CacheInfo(bytes=0, found=2, fetched=1, failed=1)
    await weights.close()
