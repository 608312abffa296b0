"""The number of weights workers on a node, with workers that fetch nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llmrun.weights import Weights
from llmrun_runtime.weights import worker_pool
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.weights.tasks import MirrorTask, PinTask, Task
from llmrun_runtime.weights.worker_pool import MAX_WORKERS, WorkerPool

# A mirror lasts until the file `released` exists, a listing 50 ms.
WORKER = """#!/bin/sh
while read -r task; do
  case "$task" in
    *'"mirror"'*) while [ ! -e {released} ]; do sleep 0.02; done ;;
    *) sleep 0.05 ;;
  esac
  echo '{{"result": '$$'}}'
  echo '{{"idle": true}}'
done
"""
SOURCE = Weights("org/model")
LISTING, MIRROR = PinTask(weights=SOURCE), MirrorTask(pin=Pin(weights=SOURCE, files=()), target=SOURCE)


@pytest.fixture
async def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WorkerPool]:
    """Return a pool whose workers are `WORKER`."""
    worker = tmp_path / "worker"
    worker.write_text(WORKER.format(released=tmp_path / "released"))
    worker.chmod(0o700)
    monkeypatch.setattr(worker_pool, "sys", SimpleNamespace(executable=str(worker)))
    pool = WorkerPool("here")
    yield pool
    (tmp_path / "released").touch()
    await pool.close()


async def run(pool: WorkerPool, task: Task, **env: str) -> Any:
    """Run a task and return its worker's process id."""
    return await pool.run(task, {"PATH": os.environ["PATH"], **env}, lambda *_: None)


def workers(tmp_path: Path) -> int:
    """Return the number of worker processes that run."""
    children = psutil.Process().children()
    return sum(child.status() != "zombie" and str(tmp_path / "worker") in child.cmdline() for child in children)


async def test_many_listings_share_few_workers(pool: WorkerPool, tmp_path: Path) -> None:
    tasks = [asyncio.create_task(run(pool, LISTING)) for _ in range(4 * MAX_WORKERS)]
    most = 0
    while not all(task.done() for task in tasks):
        most = max(most, workers(tmp_path))
        await asyncio.sleep(0.01)
    assert len({task.result() for task in tasks}) <= MAX_WORKERS
    assert 0 < most <= MAX_WORKERS


async def test_an_idle_worker_is_replaced_by_one_with_another_environment(pool: WorkerPool, tmp_path: Path) -> None:
    pids = [await run(pool, LISTING, KEY=str(number)) for number in range(2 * MAX_WORKERS)]
    assert len(set(pids)) == len(pids)
    assert workers(tmp_path) <= MAX_WORKERS


async def test_long_tasks_leave_a_worker_to_listings(pool: WorkerPool, tmp_path: Path) -> None:
    mirrors = [asyncio.create_task(run(pool, MIRROR)) for _ in range(2 * MAX_WORKERS)]
    async with asyncio.timeout(10):
        await run(pool, LISTING)
    assert not any(task.done() for task in mirrors)
    (tmp_path / "released").touch()
    await asyncio.gather(*mirrors)


async def test_a_cancelled_task_frees_its_worker(pool: WorkerPool) -> None:
    for _ in range(2 * MAX_WORKERS):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await run(pool, MIRROR)
    async with asyncio.timeout(10):
        await run(pool, LISTING)
