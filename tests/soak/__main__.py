"""`python -m tests.soak [MINUTES] [--seed N]`: prints a tally, and exits with 1 if anything fell short.

Three models with real engines on two nodes go to zero and back under mixed traffic, while a process is killed every
`--every` seconds: each kind in turn, and once the whole cluster, which `llmrun up` then starts again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.soak.faults import TURNS, Faults
from tests.soak.ledger import Ledger
from tests.soak.traffic import Caller
from tests.soak.watch import Watch
from tests.support.cluster import (
    Home,
    family,
    free_port,
    leftovers,
    make_tiny_weights,
    new_processes,
    until,
    write_app,
)

MODELS = ["soak-one", "soak-two", "soak-three"]
CALLERS = 6
SAMPLE_S = 5.0
# Rows that do not grow with requests: days of usage, cold starts (a few per model), settings.
MAX_ROWS = 200


def main() -> int:
    """Run the soak; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("minutes", nargs="?", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--every", type=float, default=30, help="seconds between two kills")
    parser.add_argument("--weights", type=Path, help="a tiny model's folder; by default it is made")
    args = parser.parse_args()
    print(f"soak: {args.minutes:g} min, a kill every {args.every:g} s, seed {args.seed}", flush=True)
    processes, files = {process.pid for process in psutil.process_iter()}, leftovers()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        weights = args.weights.absolute() if args.weights else make_tiny_weights(Path(folder) / "weights")
        home = Home(Path(folder) / "home", free_port(), {"LLMRUN_WAKE_TIMEOUT": "120"})
        home.ok("up", "--node-ip", "127.0.0.10")
        try:
            shortcomings, summary = run(home, Path(folder), weights, args.minutes, args.every, args.seed)
        finally:
            home.ok("down")
        shortcomings += [f"left behind: {what}" for what in [*new_processes(processes), *(leftovers() - files)]]
    for line in shortcomings:
        print(f"soak: {line}", flush=True)
    print(f"soak: {'fell short' if shortcomings else 'ok'}, {summary}", flush=True)
    return 1 if shortcomings else 0


def run(home: Home, folder: Path, weights: Path, minutes: float, every: float, seed: int) -> tuple[list[str], str]:
    """Run traffic and faults on a started cluster. Return what fell short, and the tally in one line."""
    dice, ledger, watch = random.Random(seed), Ledger(), Watch()
    options = f"{str(weights)!r}, cpus=0.7, idle_timeout=4, min_uptime=2"
    app = "\n\n".join(f"@llm({options}, name={name!r})\nclass Model{i}: ...\n" for i, name in enumerate(MODELS))
    home.ok("deploy", write_app(folder / "soak" / "app.py", app), "--lazy")
    faults = Faults(home, folder / "node", MODELS, ledger, dice)
    try:
        asyncio.run(_traffic_and_faults(home, faults, ledger, watch, 60 * minutes, every, dice))
        for model in MODELS:
            assert home.ask(model).status_code == 200, f"{model} does not answer at the end"
        home.unload()
        until(lambda: not any(home.engines(model) for model in MODELS), 60, "all engines have exited")
        rows = _count_rows(home.path / "llmrun.db")
        home.ok("delete", "--app", "soak", "--yes")
    finally:
        faults.close()
    shortcomings = [*ledger.shortcomings(), *watch.shortcomings()]
    shortcomings += [f"{count} rows in the table {table}" for table, count in rows.items() if count > MAX_ROWS]
    return shortcomings, _summary(ledger, watch, rows)


async def _traffic_and_faults(
    home: Home, faults: Faults, ledger: Ledger, watch: Watch, seconds: float, every: float, dice: random.Random
) -> None:
    stop, end = asyncio.Event(), time.monotonic() + seconds
    callers = [Caller(home.url, MODELS, ledger, random.Random(dice.random())) for _ in range(CALLERS)]
    async with asyncio.TaskGroup() as tasks:
        work = [tasks.create_task(caller.run(stop)) for caller in callers]
        watching = tasks.create_task(_watch(home, watch, stop))
        try:
            for what in faults.order(int(seconds // every)):
                await asyncio.sleep(every / 2)
                print(f"soak: {end - time.monotonic():.0f} s left, kill: {what}", flush=True)
                await asyncio.to_thread(faults.inflict, what)
                await asyncio.sleep(every / 2)
        finally:
            stop.set()
        await asyncio.gather(*work, watching)


async def _watch(home: Home, watch: Watch, stop: asyncio.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(OSError, psutil.Error):  # while the whole cluster is down
            engines = [process for model in MODELS for process in await asyncio.to_thread(home.engines, model)]
            await asyncio.to_thread(lambda found: watch.sample([*family(home), *found]), engines)
        await asyncio.sleep(SAMPLE_S)


def _count_rows(file: Path) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(file)) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        return {name: database.execute(f"select count(*) from {name}").fetchone()[0] for name in tables}


def _summary(ledger: Ledger, watch: Watch, rows: dict[str, int]) -> str:
    tally = ledger.tally()
    kinds = ", ".join(f"{kind} {tally[kind]}" for kind in ("answered", "refused", "broken", "unreachable", "lost"))
    causes = Counter(outcome.detail for outcome in ledger.outcomes if outcome.kind == "refused")
    refused = f" (refused: {', '.join(f'{count} × {cause}' for cause, count in causes.items())})" if causes else ""
    kills = Counter(kill.what for kill in ledger.kills)
    killed = f"{len(ledger.kills)} kills of {len(kills)} of {len(TURNS) + 1} kinds"
    return f"{kinds}{refused}; {killed}; {watch.summary()}; {sum(rows.values())} database rows"


if __name__ == "__main__":
    sys.exit(main())
