"""Two models on room for one: the time from a request for the one that is away to its first token.

`just bench-swap [--rounds N] [--pause S]` deploys two tiny Llamas that each reserve all CPUs, and asks for them in
turn. The other model's replica must end first. Beside them, the wake of a model alone: from zero, with room.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.benchmarks.cold_start import PAUSE_S, first_token
from tests.support.cluster import Home, free_port, make_tiny_weights, until, write_app

NAMES = ("left", "right")


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pause", type=float, default=3, help="seconds between an answer and the next request")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmrun-bench-") as temp:
        folder = Path(temp)
        weights = str(make_tiny_weights(folder / "weights"))
        home = Home(folder / "home", free_port())
        home.ok("up")
        try:
            options = f"cpus={psutil.cpu_count()}, min_uptime=0, engine_args={{'kv_cache_memory_bytes': '64M'}}"
            models = (f"@llm({weights!r}, name={name!r}, {options})\nclass {name.title()}: ...\n" for name in NAMES)
            home.ok("deploy", write_app(folder / "app" / "app.py", "\n".join(models)))
            times: dict[str, list[float]] = {"swap": [], "alone": []}
            for number in range(args.rounds + 1):
                for name in NAMES:
                    time.sleep(args.pause)
                    seconds = first_token(home.url, name)
                    if number:  # the first round is a warm-up
                        times["swap"].append(seconds)
                        parts = home.starts(name)[0]["parts"]
                        print(f"round {number}, swap to {name}: {seconds:.2f} s, {parts}", file=sys.stderr, flush=True)
                home.ok("unload", NAMES[1])
                until(lambda: not home.engines(NAMES[1]), 60, "the engine has exited")
                time.sleep(PAUSE_S)
                times["alone"].append(first_token(home.url, NAMES[1]))
        finally:
            home.ok("down")
    for name, values in times.items():
        print(f"{name}: {statistics.median(values):.2f} s (min {min(values):.2f}, max {max(values):.2f})")


if __name__ == "__main__":
    main()
