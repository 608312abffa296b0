"""A spare Ray worker on this node: the next replica needs no new process and no imports, which saves 1-2 s.

Without it replicas start as usual.
"""

from __future__ import annotations

import asyncio
import logging

import psutil

from llmrun_runtime import ray_internals

log = logging.getLogger("ray.serve")
KEEP_ALIVE_S = 12 * 3600
CALL_TIMEOUT_S = 5
# The replica that took the last spare worker needs the node's cores for its first responses.
DELAY_S = 5


async def keep_spare_worker(delay: float = DELAY_S) -> None:
    """Ensure after `delay` seconds that this node has an idle worker, which Serve's next replica here uses.

    Never raises.
    """
    await asyncio.sleep(delay)
    try:
        await asyncio.to_thread(_prestart_worker)
    except Exception as error:  # noqa: BLE001 - Ray's private API may change: replicas start without a spare worker
        log.warning("no spare worker: %r", error)


def _prestart_worker() -> None:
    raylet = psutil.Process().parent()
    workers = raylet.children() if raylet else []
    if any(ray_internals.SPARE_WORKER_TITLE in _title(worker) for worker in workers):
        return
    job_id = ray_internals.serve_job_id()
    if ray_internals.job_has_ended(job_id):
        return  # Ray would end the worker at once; a local cluster's parent keeps the job alive
    ray_internals.prestart_worker(job_id, KEEP_ALIVE_S, CALL_TIMEOUT_S)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
