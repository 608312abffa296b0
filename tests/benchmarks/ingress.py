"""`just bench-ingress`: what the ingress costs, beside the same engine asked directly and Ray Serve LLM.

A tiny Llama (2 layers), so that the engine is quick and what is around it shows; streams of TOKENS tokens, all callers
at once, each asking again when its stream has ended. The ways alternate; ratios are of medians over the rounds.
TTFT is from the request to its first event, TBT between events of one stream; CPU-seconds are of all processes of the
cluster but the engine's (Ray Serve LLM has the half of vLLM that makes text of tokens in its replica, which counts).
`--rounds N`, `--skip WORD`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from llmrun_runtime.engines.base import TOKEN_ENV
from llmrun_runtime.wire.headers import TOKEN_HEADER
from tests.benchmarks.cold_start import ray_serve_llm_process
from tests.support.cluster import Home, free_port, make_tiny_weights, write_app

TOKENS = 64
# Callers, and how many streams each asks for in one round.
LEVELS = {1: 12, 16: 6, 64: 4}
DIRECT, OURS, RAY = "the engine, asked directly", "llmrun", "Ray Serve LLM"
EVENT = b"data: {"


@dataclass
class Found:
    """One round of one way."""

    seconds: float = 0
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    events: int = 0
    cpu: float = 0


@dataclass(frozen=True)
class Way:
    """Where to ask, with which headers; `busy`: CPU-seconds so far of what is between caller and engine."""

    port: int
    model: str
    headers: str = ""
    busy: Callable[[], float] = lambda: 0.0


class Stream(asyncio.Protocol):
    """One connection; reads as little as can be, for client and engine share the cores."""

    def __init__(self, found: Found) -> None:
        self._found = found
        self._tail = b""
        self._last = 0.0
        self.done = asyncio.get_running_loop().create_future()

    def ask(self, transport: asyncio.WriteTransport, request: bytes) -> None:
        """Begin a stream."""
        self.done = asyncio.get_running_loop().create_future()
        self._asked, self._last = time.perf_counter(), 0.0
        transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Count events; the end is the empty chunk after `[DONE]`."""
        now, data = time.perf_counter(), self._tail + data
        events = data.count(EVENT)
        self._tail = data[-(len(EVENT) - 1) :]
        if events:
            if self._last:
                self._found.gaps += [now - self._last] + [0.0] * (events - 1)
            else:
                self._found.firsts.append(now - self._asked)
            self._last = now
            self._found.events += events
        if data.endswith(b"0\r\n\r\n") and not self.done.done():
            self._tail = b""
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Nobody may hang up."""
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the connection was closed"))


async def load(way: Way, callers: int, streams: int) -> Found:
    """One round."""
    found = Found()
    body = {"model": way.model, "prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0}
    data = json.dumps({**body, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{way.headers}"
    request = head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data

    async def caller() -> None:
        loop = asyncio.get_running_loop()
        transport, stream = await loop.create_connection(lambda: Stream(found), "127.0.0.1", way.port)
        for _ in range(streams):
            stream.ask(transport, request)
            await stream.done
        transport.close()

    cpu, begun = way.busy(), time.perf_counter()
    async with asyncio.timeout(300):
        await asyncio.gather(*(caller() for _ in range(callers)))
    found.seconds, found.cpu = time.perf_counter() - begun, way.busy() - cpu
    return found


def busy(root: psutil.Process, engine: psutil.Process) -> Callable[[], float]:
    """CPU-seconds of a cluster's processes, those of the engine (its session) left out."""

    def of_all() -> float:
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) != os.getsid(engine.pid):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    return of_all


@contextlib.contextmanager
def llmrun_ways(folder: Path, weights: Path) -> Iterator[dict[str, Way]]:
    """llmrun with the model hot, a key, limits that nobody reaches; and its engine, asked with its own token."""
    home = Home(folder / "home", free_port())
    home.ok("up", LLMRUN_FORKSERVER="0")  # the token can then be read in the engine's environment
    try:
        options = "name='m', cpus=0.5, min_replicas=1, max_ongoing_requests=1000, rpm=10_000_000"
        home.ok("deploy", write_app(folder / "m" / "app.py", f"@llm({str(weights)!r}, {options})\nclass M: ...\n"))
        key = home.run("key", "create", "bench", "--rpm", "10000000", "--tpm", "1000000000").stdout.strip()
        (engine,) = home.engines("m")
        (address,) = [detail["address"] for detail in home.status("m")["details"]]
        token = engine.environ()[TOKEN_ENV]
        parent = psutil.Process(json.loads((home.path / "cluster.json").read_text())["pid"])
        yield {
            DIRECT: Way(int(address.rpartition(":")[2]), "m", f"{TOKEN_HEADER}: {token}\r\n"),
            OURS: Way(home.port, "m", f"authorization: Bearer {key}\r\n", busy(parent, engine)),
        }
    finally:
        home.ok("down")


@contextlib.contextmanager
def ray_way(weights: Path) -> Iterator[dict[str, Way]]:
    """Ray Serve LLM with one replica that stays."""
    port = free_port()
    with ray_serve_llm_process(weights, port, "1") as server:
        process = psutil.Process(server.pid)

        def busy_ray() -> float:
            """Its engine's core is a child of the replica; the replica is between, and counts."""
            total = 0.0
            for child in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    if "EngineCore" not in " ".join(child.cmdline()):
                        times = child.cpu_times()
                        total += times.user + times.system
            return total

        yield {RAY: Way(port, "m", busy=busy_ray)}


def percentile(values: list[float], share: float) -> float:
    """Of a list that need not be sorted."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Print a table for each number of callers and, last, the ratio at the most."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip", action="append", default=[], help="ways without this in their names")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmrun-bench-")))
        weights = make_tiny_weights(folder / "weights")
        ways = stack.enter_context(llmrun_ways(folder, weights))
        if not any(word in RAY for word in args.skip):
            ways |= stack.enter_context(ray_way(weights))
        for way in ways.values():
            asyncio.run(load(way, 16, 2))  # warms up
        print("| callers | way | tokens/s | to direct | TTFT p50, ms | p99 | TBT p99, ms | CPU-s per 1,000 events |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        last = 0.0
        for callers, streams in LEVELS.items():
            rounds: dict[str, list[Found]] = {name: [] for name in ways}
            for number in range(args.rounds):
                for name in sorted(ways, reverse=bool(number % 2)):
                    rounds[name].append(asyncio.run(load(ways[name], callers, streams)))
            rates = {name: statistics.median(f.events / f.seconds for f in found) for name, found in rounds.items()}
            for name, found in rounds.items():
                firsts, gaps = [x for f in found for x in f.firsts], [x for f in found for x in f.gaps]
                cpu = 1000 * sum(f.cpu for f in found) / sum(f.events for f in found)
                figures = (
                    f"{rates[name]:.0f} | {rates[name] / rates[DIRECT]:.2f}× | {1000 * statistics.median(firsts):.1f}"
                )
                figures += f" | {1000 * percentile(firsts, 0.99):.1f} | {1000 * percentile(gaps, 0.99):.1f}"
                print(f"| {callers} | {name} | {figures} | {f'{cpu:.3f}' if name != DIRECT else ''} |", flush=True)
            last = rates[OURS] / rates[DIRECT]
    print(f"llmrun: {last:.2f}× of the engine's own throughput at {max(LEVELS)} callers")


if __name__ == "__main__":
    main()
