"""`just bench-forked`: how fast an engine from the warm parent answers, beside one that was started plainly.

Both serve SmolLM2 with the same arguments, in turns, every second round the other way round; greedy streams of 200
tokens. The last line is the ratio of their tokens per second: 0.97× is the least that is good enough.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from llmrun_runtime.engines.base import Launch, Member, ShimConfig
from llmrun_runtime.engines.forkserver.supervisor import ForkServerSupervisor, forkserver_socket
from llmrun_runtime.engines.process.engine_process import EngineProcess
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.node.environments import merged_env
from llmrun_runtime.wire.headers import TOKEN_HEADER
from tests.support.cluster import SMOLLM2

ROUNDS, TOKENS = 10, 200
CALLERS = (1, 8)


async def ask(session: aiohttp.ClientSession, engine: EngineProcess) -> None:
    """One stream of TOKENS tokens."""
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    url = f"http://127.0.0.1:{engine.port}/v1/completions"
    async with session.post(url, json={**body, "stream": True}, headers={TOKEN_HEADER: engine.token}) as answer:
        assert answer.status == 200
        await answer.read()


async def rate(session: aiohttp.ClientSession, engine: EngineProcess, callers: int) -> float:
    """Tokens per second with so many callers at once."""
    begun = time.monotonic()
    await asyncio.gather(*(ask(session, engine) for _ in range(callers)))
    return callers * TOKENS / (time.monotonic() - begun)


async def run(folder: Path) -> None:
    """Start both, measure in turns, print."""
    kind, env = get_engine("vllm"), merged_env({}, "here")
    warm = forkserver_socket(folder, "here", "vllm")
    keeper = ForkServerSupervisor(kind, warm, folder / "warm.log", env)
    keeper.start()
    engines: dict[str, EngineProcess] = {}
    try:
        for name, path in (("forked", warm), ("started", None)):
            launch = Launch(
                names=("m",),
                weights=str(SMOLLM2),
                members=(Member("here", "127.0.0.1"),),
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
        print("| callers | forked, tokens/s | started, tokens/s | ratio of medians |\n| --- | --- | --- | --- |")
        worst = 10.0
        async with aiohttp.ClientSession() as session:
            for callers in CALLERS:
                rates: dict[str, list[float]] = {name: [] for name in engines}
                for number in range(ROUNDS + 1):
                    for name, engine in sorted(engines.items(), reverse=number % 2 == 0):
                        found = await rate(session, engine, callers)
                        if number:  # the first only warms up
                            rates[name].append(found)
                forked, started = (statistics.median(rates[name]) for name in ("forked", "started"))
                worst = min(worst, forked / started)
                print(f"| {callers} | {forked:.1f} | {started:.1f} | {forked / started:.3f}× |")
        print(f"forked engines decode at {worst:.3f}× of started ones at least")
    finally:
        await asyncio.gather(*(engine.end() for engine in engines.values()))
        await keeper.close()


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="llmrun-bench-") as folder:
        asyncio.run(run(Path(folder)))


if __name__ == "__main__":
    main()
