"""`just bench-weights`: a model of 1 GiB in 5 files, from an S3 server on this machine, by llmrun and by other tools.

Each round runs all tools in turn. The table shows medians, and ratios to `rclone copy` and to a copy on disk (through
the page cache: the upper bound of any transfer). Times are those of a whole process, from its start. llmrun's are those
of the node agent's tasks: it pins the source, fetches it, and checks every byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmrun.settings import Settings
from llmrun.weights import Weights
from llmrun_runtime.weights.node_weights import NodeWeights
from tests.support.cluster import BIN
from tests.support.servers import AWS, hub_server, s3_server
from tests.support.weights import write_safetensors

FILES, FILE_BYTES = 5, 2**30 // 5
ROUNDS = 5


def make_random_model(folder: Path) -> None:
    """Make a model of random bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for number in range(FILES):
        write_safetensors(folder / f"model-{number}.safetensors", FILE_BYTES)


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    """Append the duration of the block in seconds."""
    started = time.monotonic()
    yield
    times.append(time.monotonic() - started)


async def by_llmrun(
    weights: Weights, home: Path, env: dict[str, str], times: list[float], cached_times: list[float]
) -> None:
    """Run a node agent's tasks, pin and fetch; then both once more, from the cache.

    The worker then syncs to disk. No deploy waits for that, and the other tools never sync: it is not counted.
    """
    node = NodeWeights(Settings(home=home), "127.0.0.1")
    with timed(times):
        await node.fetch(await node.pin(weights, env), env, [], [])
    with timed(cached_times):
        await node.fetch(await node.pin(weights, env), env, [], [])
    await node.close()


def main() -> None:
    """Run the benchmark and print the table."""
    root = Path(tempfile.mkdtemp(prefix="llmrun-bench-", dir=os.environ.get("TMPDIR")))
    try:
        make_random_model(root / "buckets" / "acme" / "model")
        with s3_server(root / "buckets") as s3, hub_server() as hub:
            hub.repos["acme/model"] = root / "buckets" / "acme" / "model"
            measure(root, s3.url, hub.url)
    finally:
        shutil.rmtree(root)


def measure(root: Path, s3: str, hub: str) -> None:
    """Run all tools ROUNDS times, after one round to warm up."""
    source, target = root / "buckets" / "acme" / "model", root / "target"
    home = root / "home"
    env = {**os.environ, **AWS, "LLMRUN_HOME": str(home)}
    rclone = {"TYPE": "s3", "PROVIDER": "Other", "ENV_AUTH": "true", "ENDPOINT": s3}
    env |= {f"RCLONE_CONFIG_S3_{key}": value for key, value in rclone.items()} | {"RCLONE_CONFIG": "/dev/null"}
    s3fs = f"import s3fs; s3fs.S3FileSystem(endpoint_url={s3!r}).get('acme/model', {str(target)!r}, recursive=True)"
    snapshot = "from huggingface_hub import snapshot_download as get; get('acme/model')"
    cached_times: list[float] = []

    def run(*command: str, **more: str) -> Callable[[list[float]], None]:
        def run_tool(times: list[float]) -> None:
            with timed(times):
                subprocess.run(command, env=env | more, check=True, capture_output=True)

        return run_tool

    def ours(weights: Weights, **more: str) -> Callable[[list[float]], None]:
        return lambda times: asyncio.run(by_llmrun(weights, home, env | more, times, cached_times))

    tools = {
        "copy on disk": run("cp", "-r", str(source), str(target)),
        "copy on disk, and MD5 (one thread)": lambda times: copy_and_hash(source, target, times),
        "rclone copy": run(str(BIN / "rclone"), "copy", "s3:acme/model", str(target)),
        "s3fs get": run(sys.executable, "-c", s3fs),
        "llmrun, from S3": ours(Weights("s3://acme/model", endpoint_url=s3)),
        "huggingface_hub snapshot_download (from a fake Hub in Python)": run(
            sys.executable, "-c", snapshot, HF_ENDPOINT=hub, HF_HOME=str(target), HF_HUB_DISABLE_PROGRESS_BARS="1"
        ),
        "llmrun, from the fake Hub": ours(Weights("acme/model", endpoint_url=hub), HF_HOME=str(target)),
    }
    times: dict[str, list[float]] = {name: [] for name in tools}
    for number in range(ROUNDS + 1):
        for name, run_tool in tools.items():
            run_tool(times[name])
            for folder in (target, home):
                shutil.rmtree(folder, ignore_errors=True)
            os.sync()  # so that the next tool does not wait for these writes
            if not number:
                times[name].clear()
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{FILES} files, {FILES * FILE_BYTES / 2**30:.2f} GiB, medians of {ROUNDS} rounds\n")
    print("| tool | seconds (min, max) | GiB/s | vs. rclone copy | vs. a copy on disk |")
    print("| --- | --- | --- | --- | --- |")
    for name, value in medians.items():
        rates = f"{FILES * FILE_BYTES / 2**30 / value:.2f} | {value / medians['rclone copy']:.2f}× "
        rates += f"| {value / medians['copy on disk']:.2f}×"
        print(f"| {name} | {value:.2f} ({min(times[name]):.2f}, {max(times[name]):.2f}) | {rates} |")
    print(f"\nthe same by llmrun, from its cache: {statistics.median(cached_times):.2f} s")
    print(json.dumps({name: [round(value, 2) for value in values] for name, values in times.items()}))


def copy_and_hash(source: Path, target: Path, times: list[float]) -> None:
    """Copy, and compute the MD5 of all files, as both rclone and llmrun do."""
    with timed(times):
        subprocess.run(["cp", "-r", source, target], check=True)
        for path in target.iterdir():
            with path.open("rb") as file:
                hashlib.file_digest(file, "md5")


if __name__ == "__main__":
    main()
