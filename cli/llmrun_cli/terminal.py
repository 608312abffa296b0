"""What the commands print with. Results go to standard output, all else to standard error."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_whole(table: Table) -> None:
    """A table on standard output, each row in one line however narrow the terminal is."""
    needed = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    Console(highlight=False, width=max(needed, out.width)).print(table, crop=False)


def error_line(text: str) -> None:
    """An error, as every command shows it."""
    err.print(Text.assemble(("error: ", "bold red"), text))


def note(text: str, style: str = "") -> None:
    """A line for the person that is not the result."""
    err.print(Text(text, style=style))
