"""Output, questions and options that the commands share. Results go to standard output, all else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

INTERRUPTED = 130  # as shells report Ctrl-C

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
    Console(highlight=False, width=max(needed, out.width)).print(table, crop=False)


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
