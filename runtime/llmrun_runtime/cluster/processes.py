"""Finds and stops the processes of a local cluster, whatever their parent is now, and removes their temporary files."""

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
    """Stop every process of the cluster: Ray's at once, then its engines, which exit when their leases close.

    Raises ClusterError if a process does not exit.
    """
    _end(temp, grace=0)
    # Engines and fork servers write to the home's logs. The grace period lets Python's resource tracker, one of the
    # engines' processes, remove their shared memory, and lets fork servers complete an import.
    _end(home / "logs", grace=ENGINE_GRACE_S)
    sweep_temp_dirs()
    shutil.rmtree(temp, ignore_errors=True)


def _end(folder: Path, grace: float) -> None:
    started = time.monotonic()
    while remaining := writers(folder):
        waited = time.monotonic() - started
        if waited > END_TIMEOUT_S:
            pids = ", ".join(str(process.pid) for process in remaining)
            raise ClusterError(f"processes did not exit within {END_TIMEOUT_S} s: {pids}")
        for process in remaining if waited >= grace else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(remaining, timeout=0.2)


def writers(folder: Path) -> list[psutil.Process]:
    """The processes, except this one, that have a file under the folder open for writing.

    Each Ray process writes a file in the session's folder, and each engine one in the home's. (Environment variables
    do not identify them: a process that sets its title overwrites what the system shows of its environment.)
    """
    root = f"{folder}/"
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and any(
                file.mode != "r" and file.path.startswith(root) for file in process.open_files()
            ):
                processes.append(process)
    return processes
