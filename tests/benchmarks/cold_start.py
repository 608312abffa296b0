"""`just bench-cold-start`: from a request at zero to the first token, beside vLLM's own server and Ray Serve LLM.

SmolLM2-135M-Instruct, bf16, on this machine's CPU; every engine gets `--enforce-eager --kv-cache-memory-bytes 1G`, but
for vLLM as it comes. The rounds of all ways alternate; a way starts when the one before has left no process. For vLLM
the time runs from the start of its process, for the others from the request. `--rounds N`, `--only WORD`.
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
from typing import Any

import httpx

from llmrun.wire import START_PARTS
from tests.support.cluster import BIN, REPO, SMOLLM2, Home, free_port, until, write_app

EAGER = ("--enforce-eager", "--kv-cache-memory-bytes", "1G")
ONE_PROCESS_LESS = ("--distributed-executor-backend", "uni")  # what llmrun adds on CPU
START_S = 600
SLOW_S = 50
RAY, OFF = "Ray Serve LLM", "llmrun, warm parent off"
# Between a model's end and the next request: a spare worker and what the warm parent learns come some seconds later.
REST_S = 12


def first_token(url: str, model: str, timeout: float = START_S) -> float:
    """Seconds from asking until the first piece of an answer."""
    begun = time.monotonic()
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=timeout) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                assert "choices" in line, line
                return time.monotonic() - begun
    raise AssertionError("no token came")


def vllm_server(*flags: str, **env: str) -> Callable[[], float]:
    """From the start of vLLM's own server to its first token."""

    def once() -> float:
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
        command += ["--model", str(SMOLLM2), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
        more = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **env}
        begun = time.monotonic()
        with subprocess.Popen(
            [*command, *flags], env=os.environ | more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as server:
            try:
                while True:
                    try:
                        first_token(f"http://127.0.0.1:{port}", "m")
                        return time.monotonic() - begun
                    except httpx.ConnectError:
                        assert server.poll() is None and time.monotonic() - begun < START_S
                        time.sleep(0.02)
            finally:
                server.terminate()
                server.wait(60)

    return once


@contextlib.contextmanager
def llmrun_cluster(folder: Path, model: str, **env: str) -> Iterator[Home]:
    """A cluster with the model deployed under that name."""
    home = Home(folder / "home", free_port())
    home.ok("up", **env)
    try:
        app = write_app(folder / "cold" / "app.py", f'@llm("{SMOLLM2}", name="{model}", cpus=0.5)\nclass M: ...\n')
        home.ok("deploy", app)
        yield home
    finally:
        home.ok("down")


def by_llmrun(home: Home, model: str, *, drop: bool = False) -> Callable[[], float]:
    """From a request at zero to its first token. `drop`: with nothing of any file in memory."""

    def once() -> float:
        home.ok("unload", model)
        until(lambda: not home.engines(model), 60, "the engine has ended")
        time.sleep(REST_S)
        if drop:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        return first_token(home.url, model)

    return once


@contextlib.contextmanager
def ray_serve_llm_process(
    weights: Path, port: int, least: str, *more_args: str, **env: str
) -> Iterator[subprocess.Popen[str]]:
    """Ray Serve LLM with `least` replicas when nobody asks; it needs packages that nothing else here does."""
    with tempfile.TemporaryDirectory() as folder:
        more = ["--no-deps", "--target", folder, "pyarrow", f"boto3=={version('botocore')}", "s3transfer"]
        subprocess.run(
            [*(str(BIN / "uv"), "pip", "install", "-q", "--python", sys.executable), *more],
            check=True,
        )
        path = os.pathsep.join([folder, str(REPO), os.environ.get("PYTHONPATH", "")])
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_serve_llm", str(weights), str(port), least, *more_args],
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
    """From a request at zero to the first token of Ray Serve LLM."""
    with ray_serve_llm_process(SMOLLM2, port, "0") as server:

        def once() -> float:
            print("zero?", file=server.stdin, flush=True)
            assert server.stdout and "zero" in server.stdout.readline()
            time.sleep(REST_S)
            return first_token(f"http://127.0.0.1:{port}", "m")

        yield once


def measure(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each way, round by round; of one that takes SLOW_S or more fewer rounds, of one of minutes one."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, taken in times.items():
            if taken and number >= (1 if taken[0] > 2 * SLOW_S else 3 if taken[0] > SLOW_S else rounds):
                continue
            taken.append(ways[name]())
            print(f"round {number + 1}, {name}: {taken[-1]:.2f} s", file=sys.stderr, flush=True)
    return times


def parts(home: Home, count: int) -> list[dict[str, float]]:
    """The parts of the last cold starts: seconds from the request to the end of each."""
    key = (home.path / "admin.key").read_text()
    answer = httpx.get(f"{home.url}/llmrun/v1/cold-starts/warm", headers={"authorization": f"Bearer {key}"})
    rows: list[dict[str, Any]] = answer.json()[:count]
    return [row["parts"] for row in rows]


def main() -> None:
    """Print the tables and, last, the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="ways with this in their names")
    parser.add_argument("--skip", action="append", default=[], help="ways without this in their names")
    args = parser.parse_args()
    same = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    rival, ours = "vLLM server, eager", "llmrun, files in memory"
    ways: dict[str, Callable[[], float]] = {
        rival: vllm_server(*EAGER),
        "vLLM server, eager, one process less as llmrun starts it": vllm_server(*EAGER, *ONE_PROCESS_LESS, **same),
        "vLLM server as it comes": vllm_server("--kv-cache-memory-bytes", "1G"),
    }
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmrun-bench-")))
        if args.only in RAY and not any(word in RAY for word in args.skip):
            ways[RAY] = stack.enter_context(ray_serve_llm(free_port()))
        if not any(word in OFF for word in args.skip):
            plain = stack.enter_context(llmrun_cluster(folder / "plain", "plain", LLMRUN_FORKSERVER="0"))
            ways[OFF] = by_llmrun(plain, "plain")
        warm = stack.enter_context(llmrun_cluster(folder / "warm", "warm"))
        if os.access("/proc/sys/vm/drop_caches", os.W_OK):
            ways["llmrun, no file in memory"] = by_llmrun(warm, "warm", drop=True)
        ways[ours] = by_llmrun(warm, "warm")
        unwanted = {name for name in ways if args.only not in name or any(word in name for word in args.skip)}
        ways = {name: way for name, way in ways.items() if name not in unwanted}
        times = measure(ways, args.rounds)
        each = parts(warm, 2 * args.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians.get(rival, float("nan"))
    print("\n| way | seconds to the first token: median (least, most) | rounds | to vLLM's server |")
    print("| --- | --- | --- | --- |")
    for name, value in medians.items():
        spread = f"{value:.2f} ({min(times[name]):.2f}, {max(times[name]):.2f})"
        print(f"| {name} | {spread} | {len(times[name])} | {value / base:.3f}× |")
    if each:
        print(
            "\nllmrun's parts, in seconds from the request to the end of each: "
            + ", ".join(
                f"{part.replace('_', ' ')} {statistics.median(row[part] for row in each):.2f}" for part in START_PARTS
            )
        )
    print(json.dumps({name: [round(value, 2) for value in values] for name, values in times.items()}))
    if ours in medians:
        print(f"llmrun: {medians[ours]:.2f} s to the first token, {medians[ours] / base:.3f}× of {rival}")


if __name__ == "__main__":
    main()
