"""Decode speed of an engine that was forked from the fork server, compared with a plain process.

`just bench-forked` runs both with SmolLM2 and the same arguments, and measures them in turn, in alternating order, with
greedy streams of 200 tokens. The last line is the lowest ratio of their tokens per second; at least 0.97× is required.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from llmrun_runtime.engines.base import LOOPBACK_ONLY, Launch, Member, ShimConfig
from llmrun_runtime.engines.forkserver.supervisor import ForkServerSupervisor, forkserver_socket
from llmrun_runtime.engines.process.engine_process import EngineProcess
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.node.variables import engine_env
from llmrun_runtime.wire.headers import TOKEN_HEADER
from tests.support.cluster import SMOLLM2

ROUNDS, TOKENS = 10, 200
CLIENTS = (1, 8)


async def stream(session: aiohttp.ClientSession, engine: EngineProcess) -> None:
    """Read one stream of TOKENS tokens."""
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    url = f"http://127.0.0.1:{engine.port}/v1/completions"
    async with session.post(url, json={**body, "stream": True}, headers={TOKEN_HEADER: engine.token}) as answer:
        assert answer.status == 200
        await answer.read()


async def rate(session: aiohttp.ClientSession, engine: EngineProcess, clients: int) -> float:
    """Return the tokens per second of this many concurrent clients."""
    started = time.monotonic()
    await asyncio.gather(*(stream(session, engine) for _ in range(clients)))
    return clients * TOKENS / (time.monotonic() - started)


async def run(folder: Path) -> None:
    """Start both engines, measure them, and print the table."""
    kind, env = get_engine("vllm"), LOOPBACK_ONLY | engine_env({}, "node")
    socket = forkserver_socket(folder, "node", "vllm")
    supervisor = ForkServerSupervisor(kind, socket, folder / "forkserver.log", env)
    supervisor.start()
    engines: dict[str, EngineProcess] = {}
    try:
        for name, path in (("forked", socket), ("plain", None)):
            launch = Launch(
                names=("m",),
                weights=str(SMOLLM2),
                members=(Member("node", "127.0.0.1"),),
                engine_args={},
                python=sys.executable,
                env=env,
                shim=ShimConfig(model="m"),
                log=folder / f"{name}.log",
                forkserver=path,
            )
            engine = engines[name] = EngineProcess(kind, launch)
            await engine.start()
            await engine.ready(300)
            assert engine.forked is (name == "forked")
        print("| clients | forked, tokens/s | plain, tokens/s | ratio of medians |\n| --- | --- | --- | --- |")
        lowest = 10.0
        async with aiohttp.ClientSession() as session:
            for clients in CLIENTS:
                rates: dict[str, list[float]] = {name: [] for name in engines}
                for number in range(ROUNDS + 1):
                    for name, engine in sorted(engines.items(), reverse=number % 2 == 0):
                        tokens_per_s = await rate(session, engine, clients)
                        if number:  # the first round is a warm-up
                            rates[name].append(tokens_per_s)
                forked, plain = (statistics.median(rates[name]) for name in ("forked", "plain"))
                lowest = min(lowest, forked / plain)
                print(f"| {clients} | {forked:.1f} | {plain:.1f} | {forked / plain:.3f}× |")
        print(f"a forked engine decodes at {lowest:.3f}× the speed of a plain process, or faster")
    finally:
        await asyncio.gather(*(engine.end() for engine in engines.values()))
        await supervisor.close()


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="llmrun-bench-") as folder:
        asyncio.run(run(Path(folder)))


if __name__ == "__main__":
    main()
