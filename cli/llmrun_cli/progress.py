"""Shows the progress of an operation: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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

from llmrun.wire import Event
from llmrun_cli.terminal import err, note, printable, warn

LINE_EVERY_S = 5.0


@contextmanager
def starting_cluster(url: str) -> Iterator[None]:
    """Show that a cluster is starting."""
    note(f"No cluster at {url}. Starting one on this machine (stop it with `llmrun down`).")
    with err.status("Starting a cluster (Ray, control, ingress)"):
        yield


def show_progress(
    events: Iterable[Event], operation: str, hint: str = "check it with `llmrun status`"
) -> Iterator[Event]:
    """Show an operation's steps, transfers and warnings; yield its other events.

    On Ctrl-C, tells that the operation continues, with the hint, and raises KeyboardInterrupt.
    """
    display = _Bars(operation) if err.is_terminal else _Lines()
    try:
        with display:
            for event in events:
                if event.kind == "step":
                    display.step(f"{event.model}: {event.text}" if event.model else event.text)
                elif event.kind == "progress":
                    display.progress(event)
                elif event.kind == "warning":
                    warn(f"{event.model}: {event.text}" if event.model else event.text)
                else:
                    yield event
    except KeyboardInterrupt:
        note(f"\nDetached. The {operation} continues on the cluster; {hint}.", "yellow")
        raise


class _Bars:
    """Progress bars, for a terminal."""

    def __init__(self, operation: str) -> None:
        self._spinner = Spinner("dots", Text(operation))
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
        """Show the current step; remove the bars of the previous one."""
        self._spinner.update(text=Text(printable(line)))
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()

    def progress(self, event: Event) -> None:
        """Show one transfer's progress."""
        key = (event.model, event.text)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(printable(event.text), total=event.total)
        self._bars.update(self._tasks[key], completed=event.here, total=event.total)


class _Lines:
    """Plain lines, for a file or a pipe: one per step, and one per transfer every LINE_EVERY_S."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], tuple[float, int]] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, line: str) -> None:
        """Show the current step."""
        self._last.clear()
        note(line)

    def progress(self, event: Event) -> None:
        """Show one transfer's progress."""
        key, now = (event.model, event.text), time.monotonic()
        then, bytes_then = self._last.setdefault(key, (now, event.here))
        if now - then < LINE_EVERY_S:
            return
        rate = max(event.here - bytes_then, 0) / (now - then)
        remaining = f", {(event.total - event.here) / rate:.0f} s left" if rate else ""
        note(f"  {event.text}: {decimal(event.here)} of {decimal(event.total)}, {decimal(int(rate))}/s{remaining}")
        self._last[key] = (now, event.here)
