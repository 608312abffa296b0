"""`llmrun adapter …`: LoRA adapters of a model."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from llmrun.errors import Refused, WeightsError
from llmrun.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmrun.settings import Settings
from llmrun_cli.client import Client
from llmrun_cli.progress import show_progress
from llmrun_cli.terminal import (
    AsJson,
    exit_on_interrupt,
    format_time,
    make_table,
    note,
    out,
    print_json,
    print_table,
    warn,
)

COMPLETIONS = "/v1/completions"
CHUNK_BYTES = 2**20
NOT_FOUND, UNAVAILABLE = 404, 503
MODEL_FAILED = "model_failed"
RETRY_S = 2
# Control publishes the adapter to the ingresses through a long poll.
LISTED_TIMEOUT_S = 10

adapter = typer.Typer(no_args_is_help=True, help="Manage LoRA adapters, served as `model:adapter`.")


@adapter.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with an adapter in PEFT format.")],
    name: Annotated[str, typer.Argument(metavar="MODEL:NAME", help="Model and adapter name, such as chat:legal.")],
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="Seconds to wait for a test request to succeed. 0 skips the test.")
    ] = 600,
) -> None:
    """Upload an adapter to its model's lora= location, and wait until it can be used."""
    model, _, adapter_name = name.partition(":")
    if not model or not adapter_name:
        raise WeightsError(f"{name}: must be MODEL:NAME, such as chat:legal")
    sizes = _sizes(folder.expanduser())
    client = Client(Settings())
    failure = ""
    operation = client.push_adapter(name, _tar(folder.expanduser(), sizes))
    with exit_on_interrupt():
        for event in show_progress(client.events(operation), "push"):
            if event.kind == "failed":
                failure = event.text
            else:
                out.print(event.text)
    if failure:
        raise WeightsError(failure)
    if wait:
        _wait_until_usable(client, name, wait)


def _wait_until_usable(client: Client, name: str, wait: float) -> None:
    """Send test requests until one succeeds. Raises Refused with the engine's error if the adapter cannot be used."""
    deadline = time.monotonic() + LISTED_TIMEOUT_S
    while True:
        try:
            paths = client.model_entry(name)["llmrun"]["paths"]
            break
        except Refused as error:
            if error.status != NOT_FOUND or time.monotonic() > deadline:
                raise
        time.sleep(0.1)
    if COMPLETIONS not in paths:
        note(f"{name} is listed. Not tested: its model has no {COMPLETIONS}.")
        return
    started = time.monotonic()
    while True:
        remaining = started + wait - time.monotonic()
        try:
            client.complete(name, max(remaining, 1))
            break
        except Refused as error:  # a slow store or a restart of control is temporary
            if error.status != UNAVAILABLE or error.code == MODEL_FAILED or remaining <= RETRY_S:
                raise
            note(f"{error}; retrying", "yellow")
        time.sleep(RETRY_S)
    out.print(f"{name} is ready (test request succeeded after {time.monotonic() - started:.1f} s)")


def _sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of an adapter's files in bytes. Raises WeightsError if the folder is not an adapter."""
    try:
        return {file: (folder / file).stat().st_size for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    except OSError as error:
        missing = Path(str(error.filename)).name
        raise WeightsError(f"{folder}: {missing} not found; an adapter is a folder in PEFT format") from None


def _tar(folder: Path, sizes: dict[str, int]) -> Iterator[bytes]:
    """Yield a tar archive of the files. Raises WeightsError if one changes or cannot be read."""
    for name, size in sizes.items():
        info = tarfile.TarInfo(name)
        info.size, sent = size, 0
        yield info.tobuf()
        try:
            with (folder / name).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    sent += len(chunk)
                    yield chunk
        except OSError as error:
            raise WeightsError(f"{folder / name}: cannot read the file: {error.strerror}") from None
        if sent != size:
            raise WeightsError(f"{folder / name}: changed during the upload: push again")
        yield b"\0" * (-size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


@adapter.command("list")
def list_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model name.")],
    as_json: AsJson = False,
) -> None:
    """List a model's adapters and the replicas that have them loaded."""
    rows = Client(Settings()).adapters(model)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        if row.problem:
            warn(f"{row.source}: {row.name!r} is left out: {row.problem}")
    rows = [row for row in rows if not row.problem]
    if not rows:
        out.print(f"No adapters. Upload one with `llmrun adapter push DIR {model}:NAME`.")
        return
    table = make_table("NAME", "SOURCE", "REVISION", "SIZE", "RANK", "LAST USED", "LOADED ON")
    for row in rows:
        last_used = format_time(row.last_used) if row.last_used else "-"
        rank, replicas = str(row.rank or "-"), ", ".join(row.loaded_on) or "-"
        table.add_row(f"{model}:{row.name}", row.source, row.short, decimal(row.bytes), rank, last_used, replicas)
    print_table(table)
