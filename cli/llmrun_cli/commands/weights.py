"""`llmrun weights …`: model weights on the nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from llmrun.errors import WeightsError
from llmrun.settings import Settings
from llmrun.weights import Weights
from llmrun.wire import WeightsRequest
from llmrun_cli import local_cluster
from llmrun_cli.client import Client
from llmrun_cli.progress import show_progress, starting_cluster
from llmrun_cli.terminal import (
    AsJson,
    Yes,
    confirm,
    exit_on_interrupt,
    format_time,
    make_table,
    note,
    out,
    print_json,
    print_table,
)

weights = typer.Typer(no_args_is_help=True, help="Manage model weights on the nodes.")
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="org/model, org/model@revision, s3://bucket/path, gs://bucket/path, or another URL."
    ),
]
Include = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Only include files that match (repeatable).")
]
Exclude = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Exclude files that match (repeatable).")]
EndpointUrl = Annotated[
    str, typer.Option(metavar="URL", help="API endpoint of the object store or the Hugging Face Hub.")
]


@weights.command()
def pull(source: Source, include: Include = None, exclude: Exclude = None, endpoint_url: EndpointUrl = "") -> None:
    """Download weights to all nodes, as a deploy would."""
    requested = Weights(source, include=include or (), exclude=exclude or (), endpoint_url=endpoint_url)
    _run("pull", start_cluster=True, weights=requested)


@weights.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the weights on the nodes and the models that use them."""
    rows = Client(Settings()).weights()
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print("No weights. Download some with `llmrun weights pull ORG/MODEL`.")
        return
    table = make_table("SOURCE", "PIN", "SIZE", "FILES", "LAST USED", "PINNED BY", "NODE")
    for row in rows:
        models = ", ".join(row.pinned_by) or "-"
        size, files, last_used = decimal(row.bytes), str(row.files), format_time(row.last_used)
        table.add_row(row.source, row.short, size, files, last_used, models, row.node)
    print_table(table)


@weights.command()
def verify(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Source to verify. Defaults to all.")] = "",
) -> None:
    """Verify the checksums of weights.

    Damaged files are downloaded again when they are needed.
    """
    _run("verify", weights=Weights(source) if source else None)


@weights.command()
def remove(source: Source) -> None:
    """Remove weights from all nodes."""
    _run("remove", weights=Weights(source))


@weights.command()
def prune(yes: Yes = False) -> None:
    """Remove weights that no deployed model uses, and leftovers of interrupted downloads."""
    unused = [row for row in Client(Settings()).weights() if not row.pinned_by]
    if unused and not yes:
        note("\n".join(f"- {row.source} ({row.short}, {decimal(row.bytes)}) on {row.node}" for row in unused))
        confirm("Remove these weights?")
    _run("prune")


@weights.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder on a node that contains a model.")],
    source: Annotated[str, typer.Option("--as", metavar="SOURCE", help="Source to import it as, such as org/model.")],
) -> None:
    """Import a folder as the weights of a source, for machines without network access.

    Undo with `llmrun weights remove`.
    """
    path = folder.expanduser().absolute()
    if not Settings().url and not path.is_dir():
        raise WeightsError(f"{path}: folder not found")
    _run("import", start_cluster=True, folder=str(path), weights=Weights(source))


@weights.command()
def mirror(
    source: Source,
    target: Annotated[str, typer.Argument(metavar="DEST", help="Destination, such as s3://bucket/path.")],
    endpoint_url: Annotated[str, typer.Option(metavar="URL", help="API endpoint of DEST.")] = "",
) -> None:
    """Copy weights and their checksums to your own object store."""
    _run("mirror", start_cluster=True, weights=Weights(source), target=Weights(target, endpoint_url=endpoint_url))


def _run(action: str, *, start_cluster: bool = False, **fields: Any) -> None:
    """Run an operation on weights and show its progress. Raises WeightsError with all failures."""
    settings = Settings()
    request = WeightsRequest.model_validate({"do": action, **fields})
    if start_cluster:
        local_cluster.ensure(settings, starting_cluster)
    client = Client(settings)
    operation = client.start_weights(request)
    failures = []
    with exit_on_interrupt():
        for event in show_progress(client.events(operation), f"weights {action}"):
            if event.kind == "failed":
                failures.append(event.text)
            else:
                out.print(event.text)
    if failures:
        raise WeightsError("\n       ".join(failures))
