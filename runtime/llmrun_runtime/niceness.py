"""The priority of processes for the kernel's scheduler.

Ray starts workers with a niceness of 15, and what they start inherits it: any other process of the machine would delay
engines and the ingress. `llmrun up` sets Ray's own switch (RAY_worker_niceness). On a cluster that somebody else has
started, each actor undoes it, if its account may.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

BACKGROUND = 10


def run_at_normal_priority() -> None:
    """Give this process's threads, and those that they start, the usual priority, if this account may do that."""
    if os.getpriority(os.PRIO_PROCESS, 0) <= 0:
        return
    tasks = Path("/proc/self/task")
    threads = [int(task.name) for task in tasks.iterdir()] if tasks.is_dir() else [0]  # Linux has one for each thread
    for thread in threads:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, 0)


def run_in_background() -> None:
    """Let engines and the ingress go first. Call it before this process has a second thread."""
    if os.getpriority(os.PRIO_PROCESS, 0) < BACKGROUND:
        os.setpriority(os.PRIO_PROCESS, 0, BACKGROUND)
