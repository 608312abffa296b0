"""Shows how a job goes: its steps and its transfers, as bars on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator

import typer
from rich.console import Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.spinner import Spinner
from rich.text import Text

from llmrun.errors import ControlError
from llmrun.wire import Event
from llmrun_cli.client import Client
from llmrun_cli.terminal import err, note

LINE_EVERY_S = 5.0


def follow(client: Client, job_id: str, what: str) -> Iterator[Event]:
    """The job's events, less steps and progress, which are shown, and less its end.

    Raises ControlError if control is lost before the end; Ctrl-C leaves the job running and exits with 130.
    """
    shown = _Bars(what) if err.is_terminal else _Lines()
    ended = False
    try:
        with shown:
            for event in client.events(job_id):
                line = f"{event.model}: {event.text}" if event.model else event.text
                if event.kind == "step":
                    shown.step(line)
                elif event.kind == "progress":
                    shown.progress(event)
                elif event.kind == "end":
                    ended = True
                else:
                    yield event
    except KeyboardInterrupt:
        note(f"\ndetached: the {what} goes on, `llmrun status` shows how; nothing was cancelled", "yellow")
        raise typer.Exit(130) from None
    if not ended:
        raise ControlError(
            f"control was lost before the {what}'s end: `llmrun status` says how far it came; run it again"
        )


class _Bars:
    """For a terminal."""

    def __init__(self, what: str) -> None:
        self._spinner = Spinner("dots", Text(what))
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=err,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._live = Live(Group(self._spinner, self._bars), console=err, transient=True)

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, line: str) -> None:
        """What it does now; the transfers before are over."""
        self._spinner.update(text=Text(line))
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()

    def progress(self, event: Event) -> None:
        """How far one transfer is."""
        key = (event.model, event.text)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(event.text, total=event.total)
        self._bars.update(self._tasks[key], completed=event.here, total=event.total)


class _Lines:
    """For a file or a pipe: a line for each step, and every few seconds one for each transfer."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], tuple[float, int]] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, line: str) -> None:
        """What it does now."""
        self._last.clear()
        note(line)

    def progress(self, event: Event) -> None:
        """How far one transfer is."""
        key, now = (event.model, event.text), time.monotonic()
        then, before = self._last.setdefault(key, (now, event.here))
        if now - then < LINE_EVERY_S:
            return
        rate = max(event.here - before, 0) / (now - then)
        left = f", {(event.total - event.here) / rate:.0f} s left" if rate else ""
        size = f"{decimal(event.here)} of {decimal(event.total)}"
        note(f"  {event.text}: {size}, {decimal(int(rate))}/s{left}")
        self._last[key] = (now, event.here)
