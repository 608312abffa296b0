"""`just bench-lora`: adapters that are loaded on demand, compared with Ray Serve LLM on the same bucket.

SmolLM2-135M-Instruct in bf16 on this machine's CPU, with adapters of LoRA rank 16 on all of attention (7 MB each). Both
engines have LOADED slots for adapters. Both clusters run all the time and take turns.

1. First token of an adapter that no node has: fetched from the S3 server.
2. First token of an adapter that the node has but the engine does not: it was evicted from the engine.
3. First token of a loaded adapter.
4. Failed requests, with CLIENTS concurrent requests, while all adapters must be loaded and others evicted. Then
   requests per second over the loaded adapters, and of the base model alone.
5. Time between tokens of the base model, over four streams, while requests for one token of other adapters arrive twice
   per second: of loaded adapters, and of adapters that must be loaded from the node.

`--rounds N` (of 4 and 5), `--skip Ray`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.benchmarks.cold_start import first_token, ray_serve_llm_process
from tests.benchmarks.ingress import LLMRUN, RAY
from tests.benchmarks.streams import Load, Target, measure, percentile
from tests.support.adapters import SMOL, SMOL_LAYERS, make_adapter
from tests.support.cluster import SMOLLM2, Home, free_port, write_app
from tests.support.servers import AWS, S3, s3_server

LOADED, COLD = 12, 24
CLIENTS, REQUESTS, TOKENS = 16, 64, 16
STREAMS, REQUEST_INTERVAL_S = 4, 0.5
BATCH, PAUSE_S = 6, 2
# The folder of the adapters that Ray Serve LLM has downloaded.
RAY_CACHE = Path("/tmp/ray/llm/lora/cache")


@contextlib.contextmanager
def llmrun_target(folder: Path, s3: S3) -> Iterator[Target]:
    """Run llmrun with one permanent replica."""
    home = Home(folder / "home", free_port())
    home.ok("up")
    try:
        lora = f"LoRA(Weights('s3://acme/adapters', endpoint_url={s3.url!r}), max_loaded={LOADED}, max_rank=16)"
        options = f"name='m', lora={lora}, env={AWS!r}, cpus=0.5, min_replicas=1, max_ongoing_requests=1000"
        text = f"from llmrun import Weights\n\n@llm({str(SMOLLM2)!r}, {options})\nclass M: ...\n"
        home.ok("deploy", write_app(folder / "m" / "app.py", text))
        yield Target(home.port, "m")
    finally:
        home.ok("down")


@contextlib.contextmanager
def ray_target(s3: S3) -> Iterator[Target]:
    """Run Ray Serve LLM with one permanent replica."""
    port, env = free_port(), {**AWS, "AWS_ENDPOINT_URL": s3.url}
    with ray_serve_llm_process(SMOLLM2, port, "1", "s3://acme/adapters", str(LOADED), **env):
        yield Target(port, "m")


def first(target: Target, adapter: str) -> float:
    """Return the time to the first token in milliseconds."""
    return 1000 * first_token(
        f"http://127.0.0.1:{target.port}", f"{target.model}:{adapter}" if adapter else target.model
    )


def rate(target: Target, names: list[str]) -> tuple[float, int]:
    """Return the requests per second, and the number of failed ones."""
    url = f"http://127.0.0.1:{target.port}/v1/completions"

    def one(name: str) -> bool:
        model = f"{target.model}:{name}" if name else target.model
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0}
        return httpx.post(url, json={**body, "ignore_eos": True}, timeout=300).is_error

    begun = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        failed = sum(pool.map(one, itertools.islice(itertools.cycle(names), REQUESTS)))
    return REQUESTS / (time.perf_counter() - begun), failed


def gaps(target: Target, names: list[str]) -> tuple[float, int]:
    """Return the 99th percentile of the time between the base model's tokens (ms), and the requests for `names`."""
    ended = threading.Event()

    def request_adapters() -> int:
        for number, name in enumerate(itertools.cycle(names)):
            if ended.wait(REQUEST_INTERVAL_S):
                return number
            first(target, name)
        return 0

    with ThreadPoolExecutor(1) as pool:
        requests = pool.submit(request_adapters)
        try:
            result = measure(target, Load(STREAMS, 2))
        finally:
            ended.set()
        return 1000 * percentile(result.gaps, 0.99), requests.result()


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", action="append", default=[], help="skip the target whose name contains this")
    args = parser.parse_args()
    run = uuid.uuid4().hex[:6]
    loaded = [f"loaded-{run}-{number}" for number in range(LOADED)]
    cold = [f"cold-{run}-{number}" for number in range(COLD)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmrun-bench-")))
        for seed, name in enumerate(loaded + cold):
            adapter_folder = folder / "buckets" / "acme" / "adapters" / name
            make_adapter(adapter_folder, seed, rank=16, scale=0.05, shapes=SMOL, layers=SMOL_LAYERS)
        s3 = stack.enter_context(s3_server(folder / "buckets"))
        targets = {LLMRUN: stack.enter_context(llmrun_target(folder, s3))}
        if not any(word in RAY for word in args.skip):
            stack.callback(remove_downloads, loaded + cold)
            targets[RAY] = stack.enter_context(ray_target(s3))
        rows: dict[str, dict[str, list[float]]] = {}

        def record(figure: str, name: str, value: float) -> None:
            rows.setdefault(figure, {}).setdefault(name, []).append(value)
            print(f"{figure}: {name}: {value:.1f}", file=sys.stderr, flush=True)

        def first_tokens(figure: str, adapters: list[str]) -> None:
            """Time first tokens, in alternating batches with pauses: work left from one target slows the next."""
            for at in range(0, len(adapters), BATCH):
                for name, target in targets.items():
                    time.sleep(PAUSE_S)
                    for adapter in adapters[at : at + BATCH]:
                        record(figure, name, first(target, adapter))

        for target in targets.values():
            first(target, "")
            first(target, loaded[0])  # the first adapter of all costs extra
        first_tokens("first token of an adapter, from S3, ms", cold)
        first_tokens("from the node, ms", cold[:LOADED])
        for name, target in targets.items():
            figure = f"failed of {REQUESTS} requests while all adapters must be loaded"
            record(figure, name, rate(target, loaded)[1])
            for adapter in loaded:
                first(target, adapter)
        first_tokens("loaded, ms", loaded)
        first_tokens("of the base model, ms", [""] * LOADED)
        for number in range(args.rounds):
            for name, target in sorted(targets.items(), reverse=bool(number % 2)):
                time.sleep(PAUSE_S)
                record(f"requests/s over {LOADED} adapters", name, rate(target, loaded)[0])
                record("requests/s of the base model alone", name, rate(target, [""])[0])
        for number in range(args.rounds):
            for name, target in sorted(targets.items(), reverse=bool(number % 2)):
                time.sleep(PAUSE_S)
                record("p99 between tokens of the base model, others loaded, ms", name, gaps(target, loaded)[0])
                slow, loads = gaps(target, cold)
                record("p99 between tokens of the base model, others being loaded, ms", name, slow)
                record("loads during that time", name, loads)
                for adapter in loaded:
                    first(target, adapter)
    print("| | " + " | ".join(targets) + " |")
    print("| --- |" + " --- |" * len(targets))
    for figure, by_target in rows.items():
        medians = (f"{statistics.median(by_target[name]):.1f}" for name in targets)
        print(f"| {figure} | " + " | ".join(medians) + " |")


def remove_downloads(names: list[str]) -> None:
    """Remove the adapters that Ray Serve LLM has downloaded."""
    for name in names:
        shutil.rmtree(RAY_CACHE / name, ignore_errors=True)


if __name__ == "__main__":
    main()
