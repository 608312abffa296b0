"""`llmrun adapter …`: the adapters of a model."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from llmrun.errors import Refused, WeightsError
from llmrun.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmrun.settings import Settings
from llmrun_cli.client import Client
from llmrun_cli.progress import follow
from llmrun_cli.terminal import note, out, print_whole

COMPLETIONS = "/v1/completions"
CHUNK_BYTES = 2**20
NOT_FOUND, UNAVAILABLE = 404, 503
MODEL_FAILED = "model_failed"
AGAIN_S = 2
# Ingresses hear what control knows through a long poll.
SEEN_S = 10

adapter = typer.Typer(no_args_is_help=True, help="LoRA adapters of a model (lora=), asked for as `model:adapter`.")


@adapter.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with an adapter, as PEFT saves it.")],
    name: Annotated[str, typer.Argument(metavar="MODEL:NAME", help="What it is to be called.")],
    wait: Annotated[float, typer.Option(help="Seconds until it must answer; 0: do not ask it.")] = 600,
) -> None:
    """Copy an adapter to where its model's adapters lie (lora=), and wait until it answers."""
    model, _, adapter_name = name.partition(":")
    if not model or not adapter_name:
        raise WeightsError(f"{name}: write MODEL:NAME, like chat:legal")
    sizes = _sizes(folder.expanduser())
    client = Client(Settings())
    failed = ""
    for event in follow(client, client.push_adapter(name, _tar(folder.expanduser(), sizes)), "push"):
        if event.kind == "failed":
            failed = event.text
        else:
            out.print(event.text)
    if failed:
        raise WeightsError(failed)
    if wait:
        _wait_until_it_answers(client, name, wait)


def _wait_until_it_answers(client: Client, name: str, wait: float) -> None:
    """Raises Refused with the engine's own cause if it cannot be used."""
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            paths = client.listed(name)["llmrun"]["paths"]
            break
        except Refused as error:
            if error.status != NOT_FOUND or time.monotonic() > deadline:
                raise
        time.sleep(0.1)  # the ingress hears of it in a moment
    if COMPLETIONS not in paths:
        note(f"{name} is listed; its model has no {COMPLETIONS}, so it was not asked")
        return
    started = time.monotonic()
    while True:
        left = started + wait - time.monotonic()
        try:
            client.complete(name, max(left, 1))
            break
        except Refused as error:  # its store is slow, or control was away: both pass
            if error.status != UNAVAILABLE or error.code == MODEL_FAILED or left <= AGAIN_S:
                raise
            note(f"{error}; asked again", "yellow")
        time.sleep(AGAIN_S)
    out.print(f"{name} answers (after {time.monotonic() - started:.1f} s)")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of an adapter's files. Raises WeightsError for a folder that is none."""
    try:
        return {file: (folder / file).stat().st_size for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    except OSError as error:
        missing = Path(str(error.filename)).name
        raise WeightsError(f"{folder}: it has no {missing}: an adapter is a folder as PEFT saves it") from None


def _tar(folder: Path, sizes: dict[str, int]) -> Iterator[bytes]:
    """The files as one stream. Raises WeightsError if one changes meanwhile or cannot be read."""
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
            raise WeightsError(f"{folder / name}: it cannot be read ({error.strerror})") from None
        if sent != size:
            raise WeightsError(f"{folder / name}: it changed while it was read: push again")
        yield b"\0" * (-size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


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
    for column in ("NAME", "SOURCE", "REVISION", "SIZE", "RANK", "LAST USED", "LOADED ON"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.last_used)) if row.last_used else "-"
        where = ", ".join(row.loaded_on) or "-"
        rank = str(row.rank or "-")
        table.add_row(f"{model}:{row.name}", row.source, row.short, decimal(row.bytes), rank, used, where)
    print_whole(table)
