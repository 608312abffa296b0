"""What a GPU shows: starts, decode speed next to `vllm serve`, memory at zero, two models on one GPU.

`just bench-gpu [--tokenizer FOLDER]` needs one GPU and no network: it makes random weights of a Llama with 1.2 billion
parameters in bf16. Random weights decode as fast as trained ones. Both servers get the same flags. For the decode
rounds both engines hold 0.4 of the GPU's memory, and only one is asked at a time, in turns.

Each stage prints its figures when it ends; a stage that fails prints its cause, and the next one starts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import httpx

from tests.benchmarks.cold_start import PAUSE_S, first_token
from tests.support.cluster import SMOLLM2, Home, free_port, until, write_app

START_TIMEOUT_S = 400
MAX_LEN = 2048
FAULTS = (AssertionError, OSError, KeyError, httpx.HTTPError, aiohttp.ClientError, subprocess.SubprocessError)
SHARED = 0.4  # of the GPU's memory, while both servers run
TOKENS = {1: 512, 8: 512, 64: 256}  # of each request, by the number of requests at once

WEIGHTS = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, vocab_size=49152, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
    pad_token_id=2, tie_word_embeddings=False, dtype="bfloat16")
with torch.device("cuda"):
    model = LlamaForCausalLM(config)
model.save_pretrained(sys.argv[1])
print(sum(p.numel() for p in model.parameters()))
"""


def say(stage: str, **figures: object) -> None:
    """Print a stage's figures as a JSON line."""
    print(json.dumps({"stage": stage, **figures}), flush=True)


def gpu_memory_mib() -> int:
    """Return the used memory of all GPUs, as the driver counts it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30)
    return sum(int(line) for line in done.stdout.split())


def make_weights(folder: Path, tokenizer: Path) -> None:
    """Create the random model, with a real tokenizer."""
    subprocess.run([sys.executable, "-c", WEIGHTS, folder], check=True, timeout=300)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder)


@contextlib.contextmanager
def vllm_serve(weights: Path, cache: Path, log: Path, *flags: str) -> Iterator[tuple[str, float]]:
    """Run `vllm serve`; yields its URL and the seconds from its start to the first token."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(weights), "--served-model-name", "m"]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(cache)}
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    with (
        log.open("w") as out,
        subprocess.Popen(command, env=os.environ | env, stdout=out, stderr=subprocess.STDOUT) as server,
    ):
        try:
            while True:
                try:
                    first_token(url, "m")
                    break
                except httpx.ConnectError:
                    assert server.poll() is None, f"vllm serve ended:\n{log.read_text()[-3000:]}"
                    assert time.monotonic() - started < START_TIMEOUT_S
                    time.sleep(0.05)
            yield url, time.monotonic() - started
        finally:
            server.terminate()
            server.wait(60)


async def decode(url: str, model: str, requests: int, tokens: int) -> tuple[float, float]:
    """Stream so many requests at once; return tokens per second of all, and the median seconds to the first token."""
    firsts: list[float] = []

    async def one(session: aiohttp.ClientSession) -> int:
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        began, count = time.monotonic(), 0
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    if not count:
                        firsts.append(time.monotonic() - began)
                        count = 1
                    if b'"usage":{' in line:
                        count = json.loads(line[6:])["usage"]["completion_tokens"]
        return count

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
        began = time.monotonic()
        counts = await asyncio.gather(*(one(session) for _ in range(requests)))
        seconds = time.monotonic() - began
    assert counts == [tokens] * requests, counts
    return requests * tokens / seconds, statistics.median(firsts)


def compare_decoding(ways: dict[str, tuple[str, str]], rounds: int) -> None:
    """Measure all ways (URL and model) in turns; print medians and ratios to the first way."""
    for requests, tokens in TOKENS.items():
        rates: dict[str, list[float]] = {name: [] for name in ways}
        firsts: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, (url, model) in ways.items():
                rate, first = asyncio.run(decode(url, model, requests, tokens))
                if number:  # the first round warms up
                    rates[name].append(rate)
                    firsts[name].append(first)
        base = statistics.median(next(iter(rates.values())))
        for name in ways:
            rate = statistics.median(rates[name])
            spread = [round(min(rates[name])), round(max(rates[name]))]
            figures = {"tokens_per_second": round(rate, 1), "least_most": spread, "ratio": round(rate / base, 3)}
            first = round(statistics.median(firsts[name]), 4)
            say("decode", way=name, requests=requests, **figures, first_token_s=first)


def deploy(home: Home, folder: Path, name: str, weights: Path, options: str) -> float:
    """Deploy a model under this name; return the seconds that the command took."""
    app = write_app(folder / name / "app.py", f'@llm("{weights}", name="{name}", {options})\nclass M: ...\n')
    started = time.monotonic()
    home.ok("deploy", app, "--yes")
    return time.monotonic() - started


def wakes(home: Home, name: str, rounds: int) -> None:
    """Measure wakes from zero, and the GPU's memory at zero."""
    seconds, at_zero = [], []
    for _ in range(rounds):
        home.unload(name)
        until(lambda: not home.engines(name), 60, "the engine has exited")
        at_zero.append(gpu_memory_mib())
        time.sleep(PAUSE_S)
        seconds.append(first_token(home.url, name))
    parts = [row["parts"] for row in home.starts(name)[:rounds]]
    ends = {part: round(statistics.median(row[part] for row in parts), 2) for part in parts[0]} if parts else {}
    say("wake", seconds=[round(s, 2) for s in seconds], gpu_mib_at_zero=at_zero, parts=ends)


def swaps(home: Home, names: tuple[str, str], rounds: int) -> None:
    """Measure requests for a model while another one, idle, holds the only GPU."""
    first_token(home.url, names[0])
    seconds = []
    for number in range(rounds):
        time.sleep(PAUSE_S)
        seconds.append(first_token(home.url, names[(number + 1) % 2]))
    say("swap", seconds=[round(s, 2) for s in seconds])


def stage(name: str, work: Callable[[], None]) -> bool:
    """Run one stage; print how long it took, and the cause if it fails. Return whether it did not."""
    started = time.monotonic()
    try:
        work()
    except FAULTS as error:  # the other stages still run
        say(name, failed=f"{type(error).__name__}: {str(error)[-1500:]}", at=traceback.format_exc(limit=-2)[-600:])
        return False
    say(name, took=round(time.monotonic() - started, 1))
    return True


def main() -> int:
    """Run all stages; return 1 if vLLM's own server does not start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, default=SMOLLM2, help="folder with a Llama tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--logs", type=Path, help="copy the cluster's and vLLM's logs here")
    parser.add_argument("--flags", default="", help="further flags for both engines, like --enforce-eager")
    parser.add_argument("--weights", type=Path, help="keep the random weights in this folder, or take them from it")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    home = Home(folder / "home", free_port())
    weights, cache, share = args.weights or folder / "weights", folder / "cache", str(SHARED)
    flags = f"--max-model-len {MAX_LEN} {args.flags}".strip()
    options = f'engine_args="{flags}"'
    shared_options = f'engine_args="{flags} --gpu-memory-utilization {share}", cpus=1'
    server_flags = [*flags.split(), "--gpu-memory-utilization", share]

    def start_and_decode() -> None:
        with vllm_serve(weights, cache, folder / "vllm-1.log", *server_flags) as (_, seconds):
            say("vllm serve, first start", seconds=round(seconds, 2), gpu_mib=gpu_memory_mib())
        until(lambda: gpu_memory_mib() < 1000, 30, "vLLM has left the GPU")
        with vllm_serve(weights, cache, folder / "vllm-2.log", *server_flags) as (url, seconds):
            say("vllm serve, second start", seconds=round(seconds, 2))
            say("llmrun deploy", seconds=round(deploy(home, folder, "shared", weights, shared_options), 2))
            say("llmrun, first start", seconds=round(first_token(home.url, "shared"), 2))
            ways = {"vllm serve": (url, "m"), "llmrun": (home.url, "shared")}
            compare_decoding(ways, args.rounds)

    def wake_and_swap() -> None:
        if home.find("shared"):
            home.unload("shared")
            until(lambda: not home.engines("shared"), 60, "the engine has exited")
        say("llmrun deploy", seconds=round(deploy(home, folder, "one", weights, options), 2))
        say("llmrun, first start", seconds=round(first_token(home.url, "one"), 2), gpu_mib=gpu_memory_mib())
        wakes(home, "one", args.rounds)
        deploy(home, folder, "two", weights, options)
        swaps(home, ("one", "two"), max(2, args.rounds - 1))

    def halves() -> None:
        for name in ("left", "right"):
            deploy(home, folder, name, weights, f"{options}, gpus=0.5, cpus=1")
        first_token(home.url, "left")
        first_token(home.url, "right")
        states = {name: home.status(name)["state"] for name in ("left", "right")}
        say("halves", states=states, gpu_mib=gpu_memory_mib())

    try:
        say("before", gpu_mib=gpu_memory_mib(), flags=args.flags)
        if not (weights / "tokenizer.json").exists():
            stage("weights", lambda: make_weights(weights, args.tokenizer))
        stage("up", lambda: say("up", printed=home.ok("up")[-300:]))
        if not stage("start and decode", start_and_decode) and not (folder / "vllm-2.log").exists():
            return 1
        stage("wake and swap", wake_and_swap)
        stage("halves", halves)
        stage("down", lambda: say("down", printed=home.ok("down")[-300:]))
        say("after", gpu_mib=gpu_memory_mib())
        return 0
    finally:
        if args.logs:
            shutil.make_archive(str(args.logs / "logs"), "gztar", folder, "home/logs")
            for log in folder.glob("vllm-*.log"):
                shutil.copy(log, args.logs)
        home.run("down", "--now")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
