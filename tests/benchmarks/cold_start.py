"""Time from a request at zero replicas to the first token, compared with vLLM's own server and Ray Serve LLM.

`just bench-cold-start [--rounds N] [--only WORD] [--skip WORD]` runs SmolLM2-135M-Instruct in bf16 on the CPU. Every
engine gets `--enforce-eager --kv-cache-memory-bytes 1G`, except vLLM with its defaults, which compiles. Each round runs
all scenarios in turn; one starts when the engine of the one before has exited. Time is measured from the start of the
process for vLLM, and from the request for the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import httpx

from llmrun.wire import START_PARTS
from tests.support.cluster import BIN, REPO, SMOLLM2, Home, free_port, until, write_app

EAGER = ("--enforce-eager", "--kv-cache-memory-bytes", "1G")
ONE_PROCESS = ("--distributed-executor-backend", "uni")  # llmrun's default on CPUs
START_TIMEOUT_S = 600
SLOW_S = 50
VLLM, LLMRUN = "vLLM server, eager", "llmrun, files in memory"
RAY, PLAIN = "Ray Serve LLM", "llmrun without the fork server"
# After an engine's exit, the spare worker and the fork server's cache need some seconds.
PAUSE_S = 12


def first_token(url: str, model: str, timeout: float = START_TIMEOUT_S) -> float:
    """Return the seconds from the request to the first token."""
    started = time.monotonic()
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=timeout) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                assert "choices" in line, line
                return time.monotonic() - started
    raise AssertionError("the stream had no token")


def vllm_server(*flags: str, **env: str) -> Callable[[], float]:
    """Measure from the start of vLLM's own server to its first token."""

    def once() -> float:
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
        command += ["--model", str(SMOLLM2), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
        more = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **env}
        started = time.monotonic()
        with subprocess.Popen(
            [*command, *flags], env=os.environ | more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as server:
            try:
                while True:
                    try:
                        first_token(f"http://127.0.0.1:{port}", "m")
                        return time.monotonic() - started
                    except httpx.ConnectError:
                        assert server.poll() is None and time.monotonic() - started < START_TIMEOUT_S
                        time.sleep(0.02)
            finally:
                server.terminate()
                server.wait(60)

    return once


@contextlib.contextmanager
def llmrun_cluster(folder: Path, model: str, **env: str) -> Iterator[Home]:
    """Run a cluster with the model deployed under this name during the block."""
    home = Home(folder / "home", free_port())
    home.ok("up", **env)
    try:
        app = write_app(folder / "cold" / "app.py", f'@llm("{SMOLLM2}", name="{model}", cpus=0.5)\nclass M: ...\n')
        home.ok("deploy", app)
        yield home
    finally:
        home.ok("down")


def llmrun_wake(home: Home, model: str, *, drop_caches: bool = False) -> Callable[[], float]:
    """Measure from a request at zero replicas to its first token, optionally with an empty page cache."""

    def once() -> float:
        home.ok("unload", model)
        until(lambda: not home.engines(model), 60, "the engine has exited")
        time.sleep(PAUSE_S)
        if drop_caches:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        return first_token(home.url, model)

    return once


@contextlib.contextmanager
def ray_serve_llm_process(
    weights: Path, port: int, min_replicas: str, *more_args: str, **env: str
) -> Iterator[subprocess.Popen[str]]:
    """Run Ray Serve LLM during the block, with the packages that only it needs in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        more = ["--no-deps", "--target", folder, "pyarrow", f"boto3=={version('botocore')}", "s3transfer"]
        subprocess.run(
            [*(str(BIN / "uv"), "pip", "install", "-q", "--python", sys.executable), *more],
            check=True,
        )
        path = os.pathsep.join([folder, str(REPO), os.environ.get("PYTHONPATH", "")])
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_serve_llm", str(weights), str(port), min_replicas, *more_args],
            env={**os.environ, **env, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert server.stdin and server.stdout
        try:
            assert "ready" in server.stdout.readline()
            yield server
        finally:
            server.stdin.close()
            server.wait(120)


@contextlib.contextmanager
def ray_serve_llm(port: int) -> Iterator[Callable[[], float]]:
    """Run Ray Serve LLM; yields a measurement from a request at zero replicas to its first token."""
    with ray_serve_llm_process(SMOLLM2, port, "0") as server:

        def once() -> float:
            print("zero?", file=server.stdin, flush=True)
            assert server.stdout and "zero" in server.stdout.readline()
            time.sleep(PAUSE_S)
            return first_token(f"http://127.0.0.1:{port}", "m")

        yield once


def measure(scenarios: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return each scenario's seconds by round; 3 rounds if the first takes over 50 s, 1 if it takes over 100 s."""
    times: dict[str, list[float]] = {name: [] for name in scenarios}
    for number in range(rounds):
        for name, seconds in times.items():
            if seconds and number >= (1 if seconds[0] > 2 * SLOW_S else 3 if seconds[0] > SLOW_S else rounds):
                continue
            seconds.append(scenarios[name]())
            print(f"round {number + 1}, {name}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    return times


def main() -> None:
    """Print the tables and, last, the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="run scenarios with this word in their names")
    parser.add_argument("--skip", action="append", default=[], help="skip scenarios with this word in their names")
    args = parser.parse_args()

    def selected(name: str) -> bool:
        return args.only in name and not any(word in name for word in args.skip)

    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    scenarios: dict[str, Callable[[], float]] = {
        VLLM: vllm_server(*EAGER),
        "vLLM server, eager, one process less, as llmrun starts it": vllm_server(*EAGER, *ONE_PROCESS, **one_process),
        "vLLM server with its defaults (it compiles)": vllm_server("--kv-cache-memory-bytes", "1G"),
    }
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmrun-bench-")))
        if selected(RAY):
            scenarios[RAY] = stack.enter_context(ray_serve_llm(free_port()))
        if not any(word in PLAIN for word in args.skip):
            plain = stack.enter_context(llmrun_cluster(folder / "plain", "plain", LLMRUN_FORKSERVER="0"))
            scenarios[PLAIN] = llmrun_wake(plain, "plain")
        forked = stack.enter_context(llmrun_cluster(folder / "forked", "forked"))
        if os.access("/proc/sys/vm/drop_caches", os.W_OK):
            scenarios["llmrun, no file in memory"] = llmrun_wake(forked, "forked", drop_caches=True)
        scenarios[LLMRUN] = llmrun_wake(forked, "forked")
        times = measure({name: run for name, run in scenarios.items() if selected(name)}, args.rounds)
        phases = [row["parts"] for row in forked.starts("forked")[: 2 * args.rounds]]
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians.get(VLLM, float("nan"))
    print("\n| scenario | seconds to the first token: median (min, max) | rounds | ratio to vLLM's server |")
    print("| --- | --- | --- | --- |")
    for name, value in medians.items():
        spread = f"{value:.2f} ({min(times[name]):.2f}, {max(times[name]):.2f})"
        print(f"| {name} | {spread} | {len(times[name])} | {value / base:.3f}× |")
    if phases:
        ends = {phase: statistics.median(row[phase] for row in phases) for phase in START_PARTS}
        listed = ", ".join(f"{phase.replace('_', ' ')} {seconds:.2f}" for phase, seconds in ends.items())
        print(f"\nllmrun's phases, in seconds from the request to the end of each: {listed}")
    print(json.dumps({name: [round(value, 2) for value in values] for name, values in times.items()}))
    if LLMRUN in medians:
        print(f"llmrun: {medians[LLMRUN]:.2f} s to the first token, {medians[LLMRUN] / base:.3f}× of {VLLM}")


if __name__ == "__main__":
    main()
