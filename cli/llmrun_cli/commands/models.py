"""`llmrun status`, `warm`, `unload`, `delete` and `logs`."""

from __future__ import annotations

import statistics
import time
from datetime import datetime
from typing import Annotated

import typer

from llmrun.errors import Refused
from llmrun.settings import Settings
from llmrun.wire import START_PARTS, ColdStart, ModelStatus, State, Status
from llmrun_cli.client import Client
from llmrun_cli.terminal import (
    AsJson,
    Yes,
    confirm,
    exit_on_interrupt,
    make_table,
    note,
    out,
    print_json,
    print_table,
    write,
)

POLL_S = 0.2
STUCK_S = 900.0
STYLES = {"hot": "green", "waking": "yellow", "draining": "yellow", "failed": "red", "cold": "blue"}
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Model name.")]


def status(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to show in detail.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show the deployed models and their replicas."""
    client = Client(Settings())
    current = client.status()
    if model:
        matches = tuple(row for row in current.models if model in (row.name, *row.aliases))
        if not matches:
            raise Refused(f"model {model!r} not found: list the deployed models with `llmrun status`", 404)
        current = current.model_copy(update={"models": matches})
    if as_json:
        print_json(current)
        return
    if not current.models:
        out.print(f"No models deployed at {current.url}. Deploy some with `llmrun deploy app.py`.")
    else:
        _print_models(current)
    for warning in current.warnings:
        note(warning, "yellow")
    if model:
        _print_details(current.models[0])
        _print_cold_starts(client.cold_starts(current.models[0].name))


def _print_models(current: Status) -> None:
    table = make_table("MODEL", "APP", "STATE", "VERSION", "REPLICAS", "IN FLIGHT", "ON", "WEIGHTS", "NODE", "ADDRESS")
    for row in current.models:
        state = f"[{STYLES.get(row.state, 'default')}]{row.state}[/]" + ("" if row.proven else " (not proven)")
        addresses = " ".join(replica.address or replica.state for replica in row.details)
        nodes = " ".join(sorted({replica.node for replica in row.details}))
        counts = (str(row.version), str(row.replicas), str(row.in_flight))
        table.add_row(row.name, row.app, state, *counts, row.placement, row.pin or "in place", nodes, addresses)
    print_table(table)
    for row in current.models:
        if row.cause:
            note(f"{row.name}: {row.cause}", "red" if row.state == "failed" else "yellow")


def _print_details(row: ModelStatus) -> None:
    out.print(f"\nweights   {row.model}" + (f" ({row.pin})" if row.pin else ""))
    if row.aliases:
        out.print(f"aliases   {', '.join(row.aliases)}")
    out.print(f"waiting   {row.waiting}")
    for replica in row.details:
        node = f"node {replica.node} {replica.address}".rstrip()
        cores = f", CPU cores {', '.join(map(str, replica.cores))}" if replica.cores else ""
        state = f"{replica.state}, {replica.in_flight} in flight"
        out.print(f"replica   {replica.id} v{replica.version} {state}, {node}{cores}")


def _print_cold_starts(starts: list[ColdStart]) -> None:
    """Print the last cold starts: seconds from the request to the end of each part, and the medians."""
    if not starts:
        return
    out.print("\ncold starts, in seconds since the request")
    parts = [part.replace("_", " ").upper() for part in START_PARTS]
    table = make_table("REQUESTED", *parts, "NODE", "ENGINE", right=parts)
    for start in starts:
        when = datetime.fromtimestamp(start.asked).astimezone().strftime("%m-%d %H:%M:%S")
        seconds = [f"{start.parts[part]:.2f}" if part in start.parts else "" for part in START_PARTS]
        table.add_row(when, *seconds, start.node, "forked" if start.forked else "started")
    samples = [[start.parts[part] for start in starts if part in start.parts] for part in START_PARTS]
    table.add_row("median", *(f"{statistics.median(times):.2f}" if times else "" for times in samples), style="bold")
    print_table(table)


def warm(model: ModelName, wait: Annotated[bool, typer.Option(help="Wait until the model is hot.")] = True) -> None:
    """Wake a model before its first request.

    It scales to zero after its idle_timeout, as usual.
    """
    client = Client(Settings())
    name = client.warm(model)
    if wait:
        _wait(client, name, ("hot",))
    out.print(f"{name} is {'hot' if wait else 'waking'}")


def unload(model: ModelName, wait: Annotated[bool, typer.Option(help="Wait until the model is cold.")] = True) -> None:
    """Scale a model to zero now, despite min_replicas or a schedule.

    In-flight requests finish first. The next request, or `llmrun warm`, wakes the model.
    """
    client = Client(Settings())
    name = client.unload(model)
    if wait:
        _wait(client, name, ("cold", "failed"))
    out.print(f"{name} is {'cold' if wait else 'draining'}")


def _wait(client: Client, model: str, states: tuple[State, ...]) -> None:
    """Wait until the model is in one of these states.

    Raises Refused if it reverts, fails or is deleted before that, or if nothing changes for STUCK_S.
    """
    shown, seen = "", set[str]()
    last, changed = None, time.monotonic()
    while True:
        row = next((row for row in client.status().models if row.name == model), None)
        if row is None:
            raise Refused(f"model {model!r} is no longer deployed", 404)
        if row.state in states:
            return
        if row.state == "failed":
            raise Refused(f"{model} did not start: {row.cause}", 503)
        if "cold" in states and "draining" in seen and row.state in ("waking", "hot"):
            raise Refused(f"{model} is {row.state} again: a new request arrived", 409)
        if "hot" in states and "waking" in seen and row.state in ("cold", "draining"):
            raise Refused(f"{model} is {row.state}: not enough capacity in time, or it was unloaded", 409)
        if (row.state, row.cause) != last:
            last, changed = (row.state, row.cause), time.monotonic()
        if time.monotonic() - changed > STUCK_S:
            minutes = f"{STUCK_S / 60:g} minutes"
            raise Refused(f"timed out: {model} has been {row.state} for {minutes}. See `llmrun logs {model}`.", 504)
        if row.cause and row.cause != shown:
            shown = row.cause
            note(f"{model}: {shown}", "yellow")
        seen.add(row.state)
        time.sleep(POLL_S)


def delete(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to delete.")] = "",
    app: Annotated[str, typer.Option(metavar="APP", help="Delete all models of this app.")] = "",
    yes: Yes = False,
) -> None:
    """Delete a model, or an app with all its models.

    In-flight requests finish first.
    """
    if bool(model) == bool(app):
        raise typer.BadParameter("exactly one of MODEL or --app is required")
    client = Client(Settings())
    if not yes:
        confirm(f"Delete {model or f'all models of app {app}'}?")
    for name in client.delete_model(model) if model else client.delete_app(app):
        out.print(f"Deleted {name}")


def logs(
    model: ModelName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow new output.")] = False,
    tail: Annotated[
        int, typer.Option("--tail", "-n", metavar="N", help="Lines to show from the end of each replica's log.", min=0)
    ] = 200,
) -> None:
    """Show the logs of a model's engines, hooks and replicas on all nodes."""
    source = ""
    with exit_on_interrupt():
        for chunk in Client(Settings()).logs(model, tail, follow):
            if chunk["source"] != source:
                source = chunk["source"]
                note(f"==> {model} {source} <==", "bold")
            write(chunk["text"])
