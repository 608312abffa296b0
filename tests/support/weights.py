"""A node that runs weights tasks as its agent does, and stores to fetch from."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmrun.weights import Weights
from llmrun_runtime.weights.cache.cache import Cache
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.weights.tasks import FetchTask, PinTask, Task
from tests.support.servers import AWS, S3, Hub, Proxy, hub_server, proxy_to, s3_server

MIB = 2**20
Worker = subprocess.Popen[str]


@dataclass
class Node:
    """A node without Ray: a home, and weights workers, each reused while the environment stays the same."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    idle: list[tuple[dict[str, str], Worker]] = field(default_factory=list)

    def close(self) -> None:
        """Kill the workers."""
        for worker in self.workers:
            worker.kill()
            worker.wait(10)
            for stream in (worker.stdin, worker.stdout, worker.stderr):
                if stream:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    @property
    def cache(self) -> Cache:
        """The node's cache."""
        return Cache(self.home / "weights")

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its workers."""
        ours = ("LLMRUN_", "HF_", "AWS_", "GOOGLE_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        cache = {"LLMRUN_HOME": str(self.home), "HF_HOME": str(self.home / "hf")}
        return {**clean, **cache, **AWS, **self.env}

    def start(self, task: Task, *prefix: str) -> Worker:
        """Send a task to a worker; `prefix` goes in front of the command of a new one."""
        worker = self._new_worker(prefix) if prefix else self._idle_worker() or self._new_worker()
        assert worker.stdin
        worker.stdin.write(task.model_dump_json() + "\n")
        worker.stdin.flush()
        return worker

    def _idle_worker(self) -> Worker | None:
        env = self.environment
        usable = [item for item in self.idle if item[0] == env and item[1].poll() is None]
        if not usable:
            return None
        self.idle.remove(usable[0])
        return usable[0][1]

    def _new_worker(self, prefix: tuple[str, ...] = ()) -> Worker:
        worker = subprocess.Popen(
            [*prefix, sys.executable, "-m", "llmrun_runtime.weights.worker"],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.workers.append(worker)
        return worker

    def wait(self, worker: Worker) -> dict[str, Any]:
        """Wait until a worker is idle; return its last message, `{"result": …}` or `{"error": …}`."""
        assert worker.stdout and worker.stderr
        messages: list[dict[str, Any]] = []
        while not messages or "idle" not in messages[-1]:
            line = worker.stdout.readline()
            assert line, worker.stderr.read()
            messages.append(json.loads(line))
        return messages[-2]

    def run(self, task: Task) -> Any:
        """Run a task and return its result."""
        message = self._run(task)
        assert "result" in message, message
        return message["result"]

    def error(self, task: Task, *prefix: str) -> str:
        """Run a task and return its error."""
        message = self._run(task, *prefix)
        assert "error" in message, message
        return str(message["error"])

    def _run(self, task: Task, *prefix: str) -> dict[str, Any]:
        env, worker = self.environment, self.start(task, *prefix)
        message = self.wait(worker)
        if not prefix:
            self.idle.append((env, worker))
        return message

    def pin(self, weights: Weights) -> Pin:
        """Pin a source."""
        return Pin.model_validate(self.run(PinTask(weights=weights)))

    def pin_error(self, weights: Weights) -> str:
        """The error when a source is pinned."""
        return self.error(PinTask(weights=weights))

    def fetch(self, pin: Pin) -> Path:
        """Fetch a pin and return its folder."""
        return Path(self.run(FetchTask(pin=pin)))

    def fetch_error(self, pin: Pin, *prefix: str, keep: tuple[str, ...] = ()) -> str:
        """The error when a pin is fetched."""
        return self.error(FetchTask(pin=pin, keep=keep), *prefix)

    def partial_files(self) -> list[str]:
        """The names of partial downloads."""
        folder = self.home / "weights" / "partial"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node with an empty cache."""
    node = Node(tmp_path / "node")
    yield node
    node.close()


def make_model(folder: Path, sizes: tuple[int, ...] = (3 * MIB,), seed: int = 0) -> Path:
    """Make a folder like a model's: one file of weights for each of `sizes`, and files that are not needed."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    (folder / "tokenizer.json").write_text("{}" * 1000)
    (folder / "README.md").write_text("not needed")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("not needed")
    for number, size in enumerate(sizes):
        write_safetensors(folder / f"model-{number}.safetensors", size)
    return folder


def write_safetensors(path: Path, size: int) -> None:
    """Write a valid file of `size` bytes, at least 10: one tensor of random bytes, none in a file under 128 bytes."""
    header = b"{}"
    if size >= 128:
        count = size - 128
        header = json.dumps({"t": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    header = header.ljust(min(size, 128) - 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(128, size, MIB):
            file.write(os.urandom(min(size - start, MIB)))


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of the files in a model's folder that an engine needs, by name."""
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
    """A proxy in front of the S3 server."""
    with proxy_to(s3.url) as proxy:
        yield proxy


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A small Hub."""
    with hub_server() as server:
        yield server


def on_s3(proxy: Proxy | S3, path: str = "acme/model", **options: Any) -> Weights:
    """A source on that server."""
    return Weights(f"s3://{path}", endpoint_url=proxy.url, **options)
