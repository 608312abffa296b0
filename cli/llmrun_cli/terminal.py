"""Output, questions and options that the commands share. Results go to standard output, all else to standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

INTERRUPTED = 130  # as shells report Ctrl-C
# ECMA-48's sequences: strings (titles, links, the clipboard), CSI (colors, the cursor) and other escapes. The text
# after a string without an end is kept.
_STRING = r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x00-\x1f\x7f-\x9f]*(?:\x07|\x1b\\|\x9c)"
_CSI = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
_ESCAPE = r"\x1b[ -/]*[0-Z\\^-~]"
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
_SEQUENCE = re.compile(f"{_STRING}|{_CSI}|{_ESCAPE}|{_CONTROL}")


def printable(text: str) -> str:
    """Return the text without control sequences and characters, except line feeds and tabs.

    Terminals act on them, and the text can be a model's, an engine's or a server's.
    """
    return _SEQUENCE.sub("", re.sub(r"\r(?!\n)", "\n", text))  # \r: the steps of a progress bar


class _Printable:
    """A renderable whose text has no control sequences."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the inner one. Styles become sequences later; rich's own ones are marked."""
        for text, style, control in console.render(self._inner, options):
            yield Segment(text if control else printable(text), style, control)


class _PrintableOnTerminals(RenderHook):
    def __init__(self, console: Console) -> None:
        self._console = console

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """See RenderHook."""
        return [_Printable(each) for each in renderables] if self._console.is_terminal else renderables


def _console(**options: Any) -> Console:
    console = Console(highlight=False, **options)
    console.push_render_hook(_PrintableOnTerminals(console))
    return console


out = _console(soft_wrap=True)
err = _console(stderr=True, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")]


def make_table(*columns: str, right: Collection[str] = ()) -> Table:
    """Return an empty table; the columns in `right` are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column in right else "left")
    return table


def print_table(table: Table) -> None:
    """Print a table to standard output, each row on one line even if it is wider than the terminal."""
    needed = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    _console(width=max(needed, out.width)).print(table, crop=False)


def write(text: str) -> None:
    """Write a part of a model's or an engine's output to standard output, unchanged unless that is a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(rows: BaseModel | Iterable[BaseModel]) -> None:
    """Print one message, or a list of them, as JSON."""
    if isinstance(rows, BaseModel):
        data: Any = rows.model_dump(mode="json")
    else:
        data = [row.model_dump(mode="json") for row in rows]
    print(json.dumps(data, indent=2))


def error_line(text: str) -> None:
    """Print an error."""
    err.print(Text.assemble(("error: ", "bold red"), text))


def note(text: str, style: str = "") -> None:
    """Print a line that is not part of the result."""
    err.print(Text(text, style=style))


def warn(text: str) -> None:
    """Print a warning."""
    note(f"! {text}", "yellow")


def format_time(timestamp: float) -> str:
    """Return a Unix time as local date and time."""
    return datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d %H:%M")


def confirm(question: str) -> None:
    """Ask for confirmation; abort the command on "no".

    Raises typer.BadParameter if standard input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise typer.BadParameter("--yes is required when standard input is not a terminal")
    typer.confirm(question, abort=True, err=True)


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Exit with 130 on Ctrl-C, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
