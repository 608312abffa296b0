"""`just bench-lora`: adapters that are loaded when they are asked for, beside Ray Serve LLM on the same bucket.

SmolLM2-135M-Instruct in bf16 on this machine's CPU, adapters of rank 16 on all of attention (7 MB each), HELD of them
in an engine at once, both engines with as many slots. Both clusters are up all the time and take turns.

1. First token of an adapter that no node has yet: from the S3 server.
2. First token of one that the node has and the engine has not: it was loaded before, and others after it.
3. First token of one that is loaded.
4. Requests that fail, CALLERS at once, while all adapters have to be loaded and others unloaded; then requests a
   second, over the adapters that are loaded, and of the base alone.
5. Time between tokens of the base, four streams, while other adapters are asked for twice a second for one token each:
   ones that are loaded already, and ones that have to be loaded from the node.

`--rounds N` (of 4 and 5), `--skip Ray`.
"""

from __future__ import annotations

import argparse
import asyncio
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
from tests.benchmarks.ingress import OURS, RAY, Way, load, percentile
from tests.support.adapters import SMOL, SMOL_LAYERS, make_adapter
from tests.support.cluster import SMOLLM2, Home, free_port, write_app
from tests.support.servers import AWS, S3, s3_server

HELD, COLD = 12, 24
CALLERS, REQUESTS, TOKENS = 16, 64, 16
STREAMS, PACE_S = 4, 0.5
SOME, REST_S = 6, 2
# Where Ray Serve LLM keeps what it has fetched.
RAY_CACHE = Path("/tmp/ray/llm/lora/cache")


@contextlib.contextmanager
def llmrun_way(folder: Path, s3: S3) -> Iterator[Way]:
    """llmrun, hot."""
    home = Home(folder / "home", free_port())
    home.ok("up")
    try:
        lora = f"LoRA(Weights('s3://acme/adapters', endpoint_url={s3.url!r}), max_loaded={HELD}, max_rank=16)"
        options = f"name='m', lora={lora}, env={AWS!r}, cpus=0.5, min_replicas=1, max_ongoing_requests=1000"
        text = f"from llmrun import Weights\n\n@llm({str(SMOLLM2)!r}, {options})\nclass M: ...\n"
        home.ok("deploy", write_app(folder / "m" / "app.py", text))
        yield Way(home.port, "m")
    finally:
        home.ok("down")


@contextlib.contextmanager
def ray_way(s3: S3) -> Iterator[Way]:
    """Ray Serve LLM with one replica that stays."""
    port, more = free_port(), {**AWS, "AWS_ENDPOINT_URL": s3.url}
    with ray_serve_llm_process(SMOLLM2, port, "1", "s3://acme/adapters", str(HELD), **more):
        yield Way(port, "m")


def first(way: Way, adapter: str) -> float:
    """Milliseconds to the first token."""
    return 1000 * first_token(f"http://127.0.0.1:{way.port}", f"{way.model}:{adapter}" if adapter else way.model)


def rate(way: Way, names: list[str]) -> tuple[float, int]:
    """Requests a second, and how many failed."""
    url = f"http://127.0.0.1:{way.port}/v1/completions"

    def one(name: str) -> bool:
        model = f"{way.model}:{name}" if name else way.model
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0}
        return httpx.post(url, json={**body, "ignore_eos": True}, timeout=300).is_error

    begun = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        failed = sum(pool.map(one, itertools.islice(itertools.cycle(names), REQUESTS)))
    return REQUESTS / (time.perf_counter() - begun), failed


def gaps(way: Way, names: list[str]) -> tuple[float, float]:
    """The 99th percentile of the time between the base's tokens (ms) while `names` are asked for; how many were."""
    ended = threading.Event()

    def ask_for_others() -> int:
        for number, name in enumerate(itertools.cycle(names)):
            if ended.wait(PACE_S):
                return number
            first(way, name)
        return 0

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_for_others)
        try:
            found = asyncio.run(load(way, STREAMS, 2))
        finally:
            ended.set()
        return 1000 * percentile(found.gaps, 0.99), asking.result()


def main() -> None:
    """Print a table of all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", action="append", default=[], help="ways without this in their names")
    args = parser.parse_args()
    run = uuid.uuid4().hex[:6]
    held = [f"held-{run}-{number}" for number in range(HELD)]
    cold = [f"cold-{run}-{number}" for number in range(COLD)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmrun-bench-")))
        for seed, name in enumerate(held + cold):
            place = folder / "buckets" / "acme" / "adapters" / name
            make_adapter(place, seed, rank=16, scale=0.05, shapes=SMOL, layers=SMOL_LAYERS)
        s3 = stack.enter_context(s3_server(folder / "buckets"))
        ways = {OURS: stack.enter_context(llmrun_way(folder, s3))}
        if not any(word in RAY for word in args.skip):
            stack.callback(forget, held + cold)
            ways[RAY] = stack.enter_context(ray_way(s3))
        rows: dict[str, dict[str, list[float]]] = {}

        def note(what: str, name: str, value: float) -> None:
            rows.setdefault(what, {}).setdefault(name, []).append(value)
            print(f"{what}: {name}: {value:.1f}", file=sys.stderr, flush=True)

        def turns(what: str, adapters: list[str]) -> None:
            """Time to first tokens: some of one way, then of the other, for what is busy still would slow the next."""
            for at in range(0, len(adapters), SOME):
                for name, way in ways.items():
                    time.sleep(REST_S)
                    for adapter in adapters[at : at + SOME]:
                        note(what, name, first(way, adapter))

        for way in ways.values():
            first(way, "")
            first(way, held[0])  # pays for what a first adapter brings with it
        turns("first token of an adapter, from S3, ms", cold)
        turns("from the node, ms", cold[:HELD])
        for name, way in ways.items():
            note(f"failed of {REQUESTS} requests while all have to be loaded", name, rate(way, held)[1])
            for adapter in held:
                first(way, adapter)
        turns("loaded, ms", held)
        turns("of the base, ms", [""] * HELD)
        for number in range(args.rounds):
            for name, way in sorted(ways.items(), reverse=bool(number % 2)):
                time.sleep(REST_S)
                note(f"requests/s over {HELD} adapters", name, rate(way, held)[0])
                note("requests/s of the base alone", name, rate(way, [""])[0])
        for number in range(args.rounds):
            for name, way in sorted(ways.items(), reverse=bool(number % 2)):
                time.sleep(REST_S)
                note("p99 between tokens of the base, others loaded, ms", name, gaps(way, held)[0])
                slow, asked = gaps(way, cold)
                note("p99 between tokens of the base, others being loaded, ms", name, slow)
                note("loads meanwhile", name, asked)
                for adapter in held:
                    first(way, adapter)
    print("| | " + " | ".join(ways) + " |")
    print("| --- |" + " --- |" * len(ways))
    for what, found in rows.items():
        print(f"| {what} | " + " | ".join(f"{statistics.median(found[name]):.1f}" for name in ways) + " |")


def forget(names: list[str]) -> None:
    """Remove what Ray Serve LLM has fetched."""
    for name in names:
        shutil.rmtree(RAY_CACHE / name, ignore_errors=True)


if __name__ == "__main__":
    main()
