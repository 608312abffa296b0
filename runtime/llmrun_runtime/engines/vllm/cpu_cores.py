"""Lets vLLM on CPU compute on the cores that llmrun has chosen for it (`engines.process.cores`).

vLLM binds OpenMP's threads with variables that it sets before it starts a worker process. The worker that llmrun starts
is not a process of its own, and the OpenMP of a forked one has been loaded before. So its main thread is bound here,
and OpenMP's threads, which it starts later, inherit that.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmrun_runtime.engines.base import CORES_ENV
from llmrun_runtime.engines.process.cores import parse_cpus

BIND_ENV = "VLLM_CPU_OMP_THREADS_BIND"


def chosen_cores() -> list[int]:
    """Return the CPUs that the author has chosen for this engine (BIND_ENV, `0-3,6`), or llmrun; [] if nobody has."""
    try:
        return parse_cpus(os.environ.get(BIND_ENV) or os.environ.get(CORES_ENV, ""))
    except ValueError:  # vLLM's `auto` and `nobind`, or one list for each of several workers
        return []


def tell_vllm() -> None:
    """Have vLLM bind a worker process to the cores, if it starts one."""
    if cores := os.environ.get(CORES_ENV):
        os.environ.setdefault(BIND_ENV, cores)


def bind_worker() -> None:
    """Bind workers that this process will create in itself."""
    if not chosen_cores():
        return
    from vllm.platforms import current_platform  # noqa: PLC0415 - only engines have vLLM

    if not current_platform.is_cpu():  # it may be built for other devices
        return
    from vllm.v1.worker.cpu_worker import CPUWorker  # noqa: PLC0415

    if hasattr(CPUWorker.__init__, "__wrapped__"):
        return
    original = CPUWorker.__init__

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if vllm_config.parallel_config.distributed_executor_backend == "uni":
            bind(chosen_cores())
        original(self, vllm_config, *args, **kwargs)

    CPUWorker.__init__ = init


def leave_to_workers(processes: Iterable[int]) -> None:
    """Move the threads of these processes that are not bound away from the cores: a worker then has them for itself.

    Without this, the kernel often wakes the API server on the core of the worker that has just produced a token.
    """
    cores = set(chosen_cores())
    for process in processes if cores else ():
        for thread in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                if rest := os.sched_getaffinity(int(thread.name)) - cores:
                    os.sched_setaffinity(int(thread.name), rest)


def bind(cores: list[int]) -> None:
    """Bind this thread, and those that it starts, to `cores`, and let torch use as many threads."""
    import torch  # noqa: PLC0415

    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    print(f"[llmrun] the engine computes on CPU cores {', '.join(map(str, cores))}", flush=True)
