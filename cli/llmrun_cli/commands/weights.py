"""`llmrun weights …`: what lies on the nodes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from llmrun.errors import WeightsError
from llmrun.settings import Settings
from llmrun.weights import Weights
from llmrun.wire import WeightsRequest
from llmrun_cli.client import Client
from llmrun_cli.commands import cluster
from llmrun_cli.progress import follow
from llmrun_cli.terminal import note, out, print_whole

weights = typer.Typer(no_args_is_help=True, help="See, bring, check and remove the weights that lie on the nodes.")
Source = Annotated[str, typer.Argument(help="org/model[@revision], s3://bucket/path, gs://…, or another address.")]
Include = Annotated[list[str] | None, typer.Option(help="Take these files only (a pattern; may be said again).")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave these files out (a pattern; may be said again).")]
EndpointUrl = Annotated[str, typer.Option(help="Another address of the store's API, or of the Hub.")]


@weights.command()
def pull(source: Source, include: Include = None, exclude: Exclude = None, endpoint_url: EndpointUrl = "") -> None:
    """Bring weights to every node, as a deploy would."""
    made = Weights(source, include=include or (), exclude=exclude or (), endpoint_url=endpoint_url)
    _do("pull", start=True, weights=made)


@weights.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Show what lies on the nodes, and who needs it."""
    rows = Client(Settings()).weights()
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
        return
    if not rows:
        out.print("no weights lie on the nodes; `llmrun weights pull org/model` brings some")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("SOURCE", "PIN", "SIZE", "FILES", "LAST USED", "PINNED BY", "NODE"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.last_used))
        users = ", ".join(row.pinned_by)
        table.add_row(row.source, row.short, decimal(row.bytes), str(row.files), used, users, row.node)
    print_whole(table)


@weights.command()
def verify(source: Annotated[str, typer.Argument(help="One source; without it, all.")] = "") -> None:
    """Hash the files again. A damaged one is fetched again when it is needed."""
    _do("verify", weights=Weights(source) if source else None)


@weights.command()
def remove(source: Source) -> None:
    """Remove weights from all nodes."""
    _do("remove", weights=Weights(source))


@weights.command()
def prune(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove all weights that no deployed model needs, and what broken-off downloads left."""
    idle = [row for row in Client(Settings()).weights() if not row.pinned_by]
    if idle and not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("without a terminal, say --yes")
        note("\n".join(f"- {row.source} ({row.short}, {decimal(row.bytes)}) on {row.node}" for row in idle))
        typer.confirm("Remove them?", abort=True, err=True)
    _do("prune")


@weights.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A folder of a model, on a node.")],
    source: Annotated[str, typer.Option("--as", help="The source whose name it gets, like org/model.")],
) -> None:
    """Put a folder under the name of a source: for machines without a network. `remove` undoes it."""
    path = folder.expanduser().absolute()
    if not Settings().url and not path.is_dir():
        raise WeightsError(f"{path}: there is no such folder")
    _do("import", start=True, folder=str(path), weights=Weights(source))


@weights.command()
def mirror(
    source: Source,
    target: Annotated[str, typer.Argument(metavar="DEST", help="Where to, like s3://bucket/path.")],
    endpoint_url: Annotated[str, typer.Option(help="Another address of DEST's API.")] = "",
) -> None:
    """Copy weights to a store of yours, with their checksums."""
    _do("mirror", start=True, weights=Weights(source), target=Weights(target, endpoint_url=endpoint_url))


def _do(do: str, *, start: bool = False, **fields: Any) -> None:
    """Have control do it, and show how it goes. Raises WeightsError with all that went wrong."""
    settings = Settings()
    request = WeightsRequest.model_validate({"do": do, **fields})
    if start:
        cluster.ensure(settings)
    client = Client(settings)
    failed = []
    for event in follow(client, client.start_weights(request), f"weights {do}"):
        if event.kind == "failed":
            failed.append(event.text)
        else:
            out.print(event.text)
    if failed:
        raise WeightsError("\n       ".join(failed))
