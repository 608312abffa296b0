"""Finds and ends the processes of a local cluster, whoever their parent is by now, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

import psutil

from llmrun.errors import ClusterError
from llmrun_runtime.engines.process.temp_dir import sweep_temp_dirs

END_TIMEOUT_S = 15
ENGINE_GRACE_S = 5


def end_processes(temp: Path, home: Path) -> None:
    """End every process of the cluster: Ray's at once, and then its engines, which end by themselves with their leases.

    Raises ClusterError if one does not end.
    """
    _end(temp, grace=0)
    # Python's resource tracker is among the engines' processes: given a moment it removes their shared memory. The warm
    # parents write there too, and end when they have imported what they are at.
    _end(home / "logs", grace=ENGINE_GRACE_S)
    sweep_temp_dirs()
    shutil.rmtree(temp, ignore_errors=True)


def _end(folder: Path, grace: float) -> None:
    begun = time.monotonic()
    while left := writers(folder):
        waited = time.monotonic() - begun
        if waited > END_TIMEOUT_S:
            raise ClusterError(f"these processes do not end: {', '.join(str(process.pid) for process in left)}")
        for process in left if waited >= grace else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=0.2)


def writers(folder: Path) -> list[psutil.Process]:
    """The processes that have a file under the folder open for writing, but this one.

    Each of Ray's processes writes one in the session's folder, each engine one in the home's. (Their environments
    cannot be asked: a process that sets its title overwrites what the system shows of them.)
    """
    root = f"{folder}/"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and any(
                file.mode != "r" and file.path.startswith(root) for file in process.open_files()
            ):
                found.append(process)
    return found
