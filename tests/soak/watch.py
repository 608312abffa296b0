"""Watches the memory and the open files of each long-lived process of a cluster."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

# A process has its caches, and a fork server its compiled code, after this many seconds.
SETTLED_S = 60.0
# Anonymous memory, whether or not forked processes share it: private memory (USS) and proportional memory (PSS) of a
# fork server rise by hundreds of MiB when its engines end, and those of engines when the fork server does. A fork
# server that was idle for longer than SETTLED_S grows by the caches of its first model, about 90 MiB.
GROWTH_MIB, GROWTH_FILES = 120.0, 60
TITLES = re.compile(r"ray::[A-Za-z]+|llmrun: [a-z ]+|VLLM::\w+|raylet|gcs_server|llmrun_runtime\.cluster\.\w+")


@dataclass
class Usage:
    """One process: its first settled sample and its largest later one."""

    title: str
    since: float
    base: tuple[float, int] | None = None
    """MiB and open files."""
    peak: tuple[float, int] = (0.0, 0)

    @property
    def growth(self) -> tuple[float, int]:
        """How many MiB and open files the peak lies over the base."""
        base = self.base or self.peak
        return self.peak[0] - base[0], self.peak[1] - base[1]


class Watch:
    """The usage of processes by pid and start time."""

    def __init__(self) -> None:
        self.usage: dict[tuple[int, float], Usage] = {}

    def sample(self, processes: Iterable[psutil.Process]) -> None:
        """Read all of them once."""
        now = time.monotonic()
        for process in processes:
            try:
                title = TITLES.search(" ".join(process.cmdline()))
                if not title:
                    continue
                memory = process.memory_info()
                size = (memory.rss - memory.shared) / 2**20, process.num_fds()
                usage = self.usage.setdefault((process.pid, process.create_time()), Usage(title[0].strip(), now))
            except psutil.Error:
                continue
            if now - usage.since >= SETTLED_S:
                usage.base = usage.base or size
                usage.peak = max(usage.peak[0], size[0]), max(usage.peak[1], size[1])

    def shortcomings(self) -> list[str]:
        """Return the processes that grew too much, a line each."""
        return [
            f"{usage.title} grew by {mib:.0f} MiB and {files} open files"
            for usage in self.usage.values()
            for mib, files in [usage.growth]
            if mib > GROWTH_MIB or files > GROWTH_FILES
        ]

    def summary(self) -> str:
        """Name the process that grew most."""
        settled = [usage for usage in self.usage.values() if usage.base]
        if not settled:
            return f"no process lived longer than {SETTLED_S:g} s"
        most = max(settled, key=lambda usage: usage.growth)
        return f"largest growth {most.growth[0]:.0f} MiB ({most.title}), of {len(settled)} processes"
