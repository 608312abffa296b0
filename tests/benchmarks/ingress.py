"""Overhead of the ingress, compared with direct requests to the same engine and with Ray Serve LLM.

`just bench-ingress [--rounds N] [--skip WORD]` uses a tiny Llama (2 layers), so that the time outside the engine is
visible. Clients read streams of TOKENS tokens concurrently; each sends its next request when a stream ends. The targets
alternate, and ratios are of medians over the rounds. TTFT is the time from a request to its first event, TBT the time
between events of one stream. CPU-seconds are those of the cluster's processes except the engine's. The replica of Ray
Serve LLM contains vLLM's detokenizer, which counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from llmrun_runtime.engines.base import TOKEN_ENV
from llmrun_runtime.wire.headers import TOKEN_HEADER
from tests.benchmarks.cold_start import ray_serve_llm_process
from tests.benchmarks.streams import Load, Result, Target, measure, summarize
from tests.support.cluster import Home, free_port, make_tiny_weights, write_app

TOKENS = 64
# The number of clients, and the streams of each in one round.
LEVELS = {1: 12, 16: 6, 64: 4}
DIRECT, LLMRUN, RAY = "the engine, called directly", "llmrun", "Ray Serve LLM"


def cluster_cpu_s(root: psutil.Process, engine: psutil.Process) -> Callable[[], float]:
    """Return a function for the CPU-seconds of a cluster's processes, except those in the engine's session."""

    def cpu_s() -> float:
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) != os.getsid(engine.pid):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    return cpu_s


@contextlib.contextmanager
def llmrun_targets(folder: Path, weights: Path) -> Iterator[dict[str, Target]]:
    """Run llmrun with a hot model, an API key and limits that are never reached; yields it and its engine."""
    home = Home(folder / "home", free_port())
    home.ok("up", LLMRUN_FORKSERVER="0")  # a plain engine has its token in its environment
    try:
        options = "name='m', cpus=0.5, min_replicas=1, max_ongoing_requests=1000, rpm=10_000_000"
        home.ok("deploy", write_app(folder / "m" / "app.py", f"@llm({str(weights)!r}, {options})\nclass M: ...\n"))
        key = home.run("key", "create", "bench", "--rpm", "10000000", "--tpm", "1000000000").stdout.strip()
        (engine,) = home.engines("m")
        (address,) = [detail["address"] for detail in home.status("m")["details"]]
        token = engine.environ()[TOKEN_ENV]
        root = psutil.Process(json.loads((home.path / "cluster.json").read_text())["pid"])
        yield {
            DIRECT: Target(int(address.rpartition(":")[2]), "m", f"{TOKEN_HEADER}: {token}\r\n"),
            LLMRUN: Target(home.port, "m", f"authorization: Bearer {key}\r\n", cluster_cpu_s(root, engine)),
        }
    finally:
        home.ok("down")


@contextlib.contextmanager
def ray_target(weights: Path) -> Iterator[dict[str, Target]]:
    """Run Ray Serve LLM with one permanent replica."""
    port = free_port()
    with ray_serve_llm_process(weights, port, "1") as server:
        process = psutil.Process(server.pid)

        def cpu_s() -> float:
            """Return the CPU-seconds of all processes but the engine core, a child of the replica."""
            total = 0.0
            for child in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    if "EngineCore" not in " ".join(child.cmdline()):
                        times = child.cpu_times()
                        total += times.user + times.system
            return total

        yield {RAY: Target(port, "m", cpu_s=cpu_s)}


def main() -> None:
    """Print a row for each number of clients and target and, last, the ratio at the most clients."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip", action="append", default=[], help="skip targets with this word in their names")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmrun-bench-")))
        weights = make_tiny_weights(folder / "weights")
        targets = stack.enter_context(llmrun_targets(folder, weights))
        if not any(word in RAY for word in args.skip):
            targets |= stack.enter_context(ray_target(weights))
        for target in targets.values():
            measure(target, Load(16, 2, TOKENS))  # a warm-up
        print("| clients | target | tokens/s | ratio to direct | TTFT p50, ms | TTFT p99, ms | TBT p99, ms ", end="")
        print("| CPU-s per 1,000 tokens |\n" + "| --- " * 8 + "|")
        ratio = 0.0
        for clients, streams in LEVELS.items():
            load = Load(clients, streams, TOKENS)
            rounds: dict[str, list[Result]] = {name: [] for name in targets}
            for number in range(args.rounds):
                for name in sorted(targets, reverse=bool(number % 2)):
                    rounds[name].append(measure(targets[name], load))
            summaries = {name: summarize(results, load) for name, results in rounds.items()}
            direct = summaries[DIRECT].rate
            for name, summary in summaries.items():
                cells = [str(clients), name, f"{summary.rate:.0f}", f"{summary.rate / direct:.2f}×"]
                percentiles = summary.first_p50, summary.first_p99, summary.gap_p99
                cells += [f"{1000 * seconds:.1f}" for seconds in percentiles]
                cells.append(f"{summary.cpu:.3f}" if name != DIRECT else "")
                print(f"| {' | '.join(cells)} |", flush=True)
            ratio = summaries[LLMRUN].rate / direct
    print(f"llmrun: {ratio:.2f}× of the engine's own throughput at {max(LEVELS)} clients")


if __name__ == "__main__":
    main()
