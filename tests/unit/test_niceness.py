"""The niceness of the cluster's processes."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import os, threading
from llmrun_runtime import niceness
os.nice({before})
threads = []
ready, go = threading.Event(), threading.Event()
def run():
    threads.append(threading.get_native_id())
    ready.set()
    go.wait()
other = threading.Thread(target=run)
if {with_thread}:
    other.start()
    ready.wait()
niceness.{function}()
print(os.getpriority(os.PRIO_PROCESS, 0), *(os.getpriority(os.PRIO_PROCESS, each) for each in threads))
go.set()
"""


def run(function: str, before: int, *, with_thread: bool) -> list[int]:
    """Return the niceness of the main thread, and of the other one, after a call of `function`."""
    script = SCRIPT.format(function=function, before=before, with_thread=with_thread)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    return [int(word) for word in done.stdout.split()]


def test_an_actor_undoes_rays_niceness_if_its_account_may() -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    expected = 0 if os.geteuid() == 0 else usual + 15
    assert run("run_at_normal_priority", 15, with_thread=True) == [expected, expected]


def test_background_work_is_nice() -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    for before in (0, 15):
        assert run("run_in_background", before, with_thread=False) == [max(10, usual + before)]
