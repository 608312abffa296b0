"""`llmrun status`, `chat`, `logs` and `delete`: the models that are deployed."""

from __future__ import annotations

import json
import statistics
import sys
import time
from datetime import datetime
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from llmrun.errors import ControlError, Refused, Unreachable
from llmrun.settings import Settings
from llmrun.wire import START_PARTS, ColdStart, ModelStatus, State
from llmrun_cli.client import Client, refused
from llmrun_cli.terminal import note, out, print_whole

POLL_S = 0.2
STUCK_S = 900.0
STYLES = {"hot": "green", "waking": "yellow", "draining": "yellow", "failed": "red", "cold": "blue"}


def status(
    model: Annotated[str, typer.Argument(help="One model, in detail.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show what is deployed and what runs."""
    client = Client(Settings())
    found = client.status()
    if model:
        found = found.model_copy(update={"models": tuple(m for m in found.models if model in (m.name, *m.aliases))})
        if not found.models:
            raise Refused(f"there is no model {model!r}: `llmrun status` lists those that are deployed", 404)
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=2))
        return
    if not found.models:
        out.print(f"{found.url}: nothing is deployed; `llmrun deploy app.py` does")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("MODEL", "APP", "STATE", "VERSION", "REPLICAS", "IN FLIGHT", "ON", "WEIGHTS", "NODE", "ADDRESS"):
        table.add_column(column, no_wrap=True)
    for row in found.models:
        state = f"[{STYLES[row.state]}]{row.state}[/]" + ("" if row.proven else " (not proven)")
        addresses = " ".join(detail.address or detail.state for detail in row.details)
        nodes = " ".join(sorted({detail.node for detail in row.details}))
        counts = (str(row.version), str(row.replicas), str(row.in_flight))
        table.add_row(row.name, row.app, state, *counts, row.placement, row.pin or "in place", nodes, addresses)
    print_whole(table)
    for row in found.models:
        if row.cause:
            note(f"{row.name}: {row.cause}", "red" if row.state == "failed" else "yellow")
    if model:
        _details(found.models[0])
        _starts(client.starts(found.models[0].name))


def _details(row: ModelStatus) -> None:
    out.print(f"\nweights   {row.model}" + (f" ({row.pin})" if row.pin else ""))
    if row.aliases:
        out.print(f"aliases   {', '.join(row.aliases)}")
    out.print(f"waiting   {row.waiting}")
    for detail in row.details:
        where = f"node {detail.node} {detail.address}".rstrip()
        out.print(f"replica   {detail.id} v{detail.version} {detail.state}, {detail.in_flight} in flight, {where}")


def _starts(starts: list[ColdStart]) -> None:
    """The last cold starts: seconds from the request to the end of each part, and the medians."""
    if not starts:
        return
    out.print("\nfrom zero, in seconds until")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ASKED", *(part.replace("_", " ").upper() for part in START_PARTS), "NODE", "ENGINE"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("ASKED", "NODE", "ENGINE") else "right")
    for start in starts:
        when = datetime.fromtimestamp(start.asked).astimezone().strftime("%m-%d %H:%M:%S")
        parts = [f"{start.parts[part]:.2f}" if part in start.parts else "" for part in START_PARTS]
        table.add_row(when, *parts, start.node, "forked" if start.forked else "started")
    known = [[start.parts[part] for start in starts if part in start.parts] for part in START_PARTS]
    table.add_row("median", *(f"{statistics.median(times):.2f}" if times else "" for times in known), style="bold")
    print_whole(table)


def warm(
    model: Annotated[str, typer.Argument(help="The model.")],
    wait: Annotated[bool, typer.Option(help="Return when it answers.")] = True,
) -> None:
    """Wake a model before somebody asks. It goes back to zero after its idle_timeout, as always."""
    client = Client(Settings())
    name = client.warm(model)
    if wait:
        _wait(client, name, ("hot",))
    out.print(f"{name} is {'hot' if wait else 'waking'}")


def unload(
    model: Annotated[str, typer.Argument(help="The model.")],
    wait: Annotated[bool, typer.Option(help="Return when it is at zero.")] = True,
) -> None:
    """Send a model to zero now, also one with min_replicas or a schedule; requests in flight end in peace.

    The next request, or `llmrun warm`, wakes it.
    """
    client = Client(Settings())
    name = client.unload(model)
    if wait:
        _wait(client, name, ("cold", "failed"))
    out.print(f"{name} is {'cold' if wait else 'draining'}")


def _wait(client: Client, model: str, states: tuple[State, ...]) -> None:
    """Until the model is in one of these states.

    Raises Refused if it turns back, fails or is deleted meanwhile, or if for STUCK_S nothing changes at all.
    """
    shown, seen = "", set[State]()
    last, changed = None, time.monotonic()
    while True:
        row = next((row for row in client.status().models if row.name == model), None)
        if row is None:
            raise Refused(f"{model} is not deployed any more", 404)
        if row.state in states:
            return
        if row.state == "failed":
            raise Refused(f"{model} did not start: {row.cause}", 503)
        if "cold" in states and "draining" in seen and row.state in ("waking", "hot"):
            raise Refused(f"{model} is {row.state}: somebody asked for it again", 409)
        if "hot" in states and "waking" in seen and row.state in ("cold", "draining"):
            raise Refused(f"{model} is {row.state}: it found no room in time, or somebody unloaded it", 409)
        if (row.state, row.cause) != last:
            last, changed = (row.state, row.cause), time.monotonic()
        if time.monotonic() - changed > STUCK_S:
            raise Refused(
                f"{model} has been {row.state} for {STUCK_S / 60:g} minutes: `llmrun logs {model}` says more", 504
            )
        if row.cause and row.cause != shown:
            shown = row.cause
            note(f"{model}: {shown}", "yellow")
        seen.add(row.state)
        time.sleep(POLL_S)


def delete(
    model: Annotated[str, typer.Argument(help="The model to remove.")] = "",
    app: Annotated[str, typer.Option(help="Remove all models of this app.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model, or an app with all its models. Requests in flight end in peace."""
    if bool(model) == bool(app):
        raise typer.BadParameter("name a model, or an app with --app")
    client = Client(Settings())
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("without a terminal, say --yes")
        typer.confirm(f"Remove {model or f'all models of {app}'}?", abort=True, err=True)
    for name in client.delete_model(model) if model else client.delete_app(app):
        out.print(f"removed {name}")


def logs(
    model: Annotated[str, typer.Argument(help="The model.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    tail: Annotated[int, typer.Option("--tail", "-n", help="Lines of each replica to begin with.", min=0)] = 200,
) -> None:
    """Show what a model's engines, shims and replicas have written, on all nodes."""
    source = ""
    try:
        for piece in Client(Settings()).logs(model, tail, follow):
            if piece["source"] != source:
                source = piece["source"]
                note(f"==> {model} {source} <==", "bold")
            sys.stdout.write(piece["text"])
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def chat(
    model: Annotated[str, typer.Argument(help="The model.")],
    prompt: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 512,
    temperature: Annotated[float | None, typer.Option(help="0: the same answer each time.", min=0)] = None,
) -> None:
    """Talk to a model; its answer streams. A cold model wakes first."""
    settings = Settings()
    key = settings.api_key or settings.resolved_admin_key()
    http = httpx.Client(
        base_url=settings.resolved_url(),
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(None, connect=5),
        trust_env=False,
    )
    options: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
    if temperature is not None:
        options["temperature"] = temperature
    messages: list[dict[str, str]] = []
    try:
        while True:
            question = prompt if prompt is not None else input("> ")
            if question.strip():
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": _ask(http, {**options, "messages": messages})})
            if prompt is not None:
                return
    except EOFError:
        print()
    except KeyboardInterrupt:
        print()
        raise typer.Exit(130) from None


def _ask(http: httpx.Client, body: dict[str, Any]) -> str:
    """Stream one answer to standard output; the whole of it. Raises ControlError."""
    answer = ""
    try:
        _say_if_cold(http, body["model"])
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            if response.is_error:
                response.read()
                raise refused(response)
            for line in response.iter_lines():
                if line.startswith(": "):  # what is said to those who wait
                    note(line[2:], "dim")
                data = line.removeprefix("data: ")
                if line.startswith("data: ") and data != "[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise ControlError(event["error"]["message"])
                    for choice in event["choices"]:
                        piece = choice["delta"].get("content") or ""
                        answer += piece
                        print(piece, end="", flush=True)
    except httpx.RemoteProtocolError as error:
        raise ControlError(f"the answer broke off ({error}): `llmrun logs {body['model']}` may say why") from error
    except httpx.HTTPError as error:
        raise Unreachable(f"no answer from {http.base_url} ({error}): start a cluster with `llmrun up`") from error
    print()
    return answer


def _say_if_cold(http: httpx.Client, model: str) -> None:
    """A word for whoever waits. Raises httpx.HTTPError."""
    found = http.get(f"/v1/models/{model}", timeout=5)
    if found.is_success and (state := found.json().get("llmrun", {}).get("state")) not in ("hot", None):
        note(f"{model} is {state}: its engine starts first", "dim")
