"""`llmrun adapter …`: the adapters of a model."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from llmrun.settings import Settings
from llmrun_cli.client import Client
from llmrun_cli.terminal import out, print_whole

adapter = typer.Typer(no_args_is_help=True, help="LoRA adapters of a model (lora=), asked for as `model:adapter`.")


@adapter.callback()
def group() -> None:
    """So that `list` stays a word of its own."""


@adapter.command("list")
def list_(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show the adapters that a model has, and where they are loaded."""
    rows = Client(Settings()).adapters(model)
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
        return
    if not rows:
        out.print(f"{model} has no adapters at its lora= address now")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NAME", "SOURCE", "REVISION", "SIZE", "LAST USED", "LOADED ON"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.last_used)) if row.last_used else "-"
        where = ", ".join(row.loaded_on) or "-"
        table.add_row(f"{model}:{row.name}", row.source, row.short, decimal(row.bytes), used, where)
    print_whole(table)
