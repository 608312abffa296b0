"""A node that is sent errands for weights as its agent sends them, and stores that it fetches from."""

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
from llmrun_runtime.weights.worker import WorkerTask
from tests.support.servers import AWS, S3, Hub, Proxy, hub_server, proxy_to, s3_server

MIB = 2**20


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
        process.stdin.write(WorkerTask.model_validate({"do": do, **fields}).model_dump_json() + "\n")
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
