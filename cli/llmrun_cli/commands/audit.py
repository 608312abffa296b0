"""`llmrun audit`: who changed what."""

from __future__ import annotations

from typing import Annotated

import typer

from llmrun.settings import Settings
from llmrun_cli.client import Client
from llmrun_cli.terminal import AsJson, format_time, make_table, out, print_json, print_table


def audit(
    tail: Annotated[int, typer.Option("--tail", "-n", metavar="N", help="How many changes.", min=1, max=10_000)] = 50,
    as_json: AsJson = False,
) -> None:
    """Show the last changes of the cluster: who made them, from where, and with what result."""
    rows = Client(Settings()).audit(tail)
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print("No changes recorded.")
        return
    table = make_table("TIME", "WHO", "BY", "FROM", "ACTION", "SUBJECT", "STATUS")
    for row in rows:
        result = str(row.status or "broken off")
        table.add_row(format_time(row.at), row.who, row.by or "-", row.client, row.action, row.subject or "-", result)
    print_table(table)
