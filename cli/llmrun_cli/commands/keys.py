"""`llmrun key …` and `llmrun usage`: who may ask, and who asked for what."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.table import Table

from llmrun.errors import Refused
from llmrun.settings import Settings
from llmrun.wire import KeyInfo, UsageLine
from llmrun_cli.client import Client
from llmrun_cli.commands import cluster
from llmrun_cli.terminal import note, out, print_whole

key = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys. While there is none, everybody may ask.")
DURATION = re.compile(r"^(\d+)([smhdw])$")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


class By(StrEnum):
    """What usage can be told apart by."""

    day = "day"
    key = "key"
    model = "model"
    adapter = "adapter"


@key.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is called in lists and usage.")],
    model: Annotated[list[str] | None, typer.Option(help="It is for this model only (may be said again).")] = None,
    rpm: Annotated[int, typer.Option(min=0, help="Requests a minute; 0: any number.")] = 0,
    tpm: Annotated[int, typer.Option(min=0, help="Tokens a minute, of prompts and answers; 0: any number.")] = 0,
    max_in_flight: Annotated[int, typer.Option(min=0, help="Requests at once; 0: any number.")] = 0,
    wake: Annotated[bool, typer.Option(help="--no-wake: it reaches hot models only, and keeps none hot.")] = True,
    expires: Annotated[str, typer.Option(help="After so long (30d, 12h), or at a time (2027-01-31).")] = "",
) -> None:
    """Make an API key, and show it this once. From the first one on, nobody may ask without a key."""
    try:
        facts = KeyInfo(
            name=name,
            models=tuple(model or ()),
            rpm=rpm,
            tpm=tpm,
            max_in_flight=max_in_flight,
            wake=wake,
            expires=_moment(expires).timestamp() if expires else 0,
        )
    except ValidationError:
        text = f"{name!r}: a key's name has 1 to 63 lower-case letters, digits, '.', '_' and '-'"
        raise Refused(text, 422) from None
    if name == "admin":
        raise Refused("'admin': usage calls the admin key so; choose another name", 422)
    settings = Settings()
    cluster.ensure(settings)
    made = Client(settings).create_key(facts)
    note(f"the key {name}, which is not shown again:")
    print(made.key)


@key.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show the keys that there are, and what they may."""
    rows = Client(Settings()).keys()
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
        return
    if not rows:
        out.print("there are no keys, so everybody on this machine may ask; `llmrun key create NAME` makes one")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NAME", "MODELS", "RPM", "TPM", "AT ONCE", "WAKES", "EXPIRES", "CREATED"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        limits = [str(limit or "any") for limit in (row.rpm, row.tpm, row.max_in_flight)]
        expires = _shown(row.expires) if row.expires else "never"
        expires += " (over)" if 0 < row.expires <= time.time() else ""
        models = ", ".join(row.models) or "all"
        table.add_row(row.name, models, *limits, "yes" if row.wake else "no", expires, _shown(row.created))
    print_whole(table)


@key.command()
def revoke(name: Annotated[str, typer.Argument(help="The key's name.")]) -> None:
    """End a key: within 2 seconds nobody comes in with it any more."""
    Client(Settings()).revoke_key(name)
    out.print(f"the key {name} is revoked")


def usage(
    by: Annotated[list[By] | None, typer.Option(help="Tell apart by this (may be said again).")] = None,
    since: Annotated[str, typer.Option(help="From this day on (2026-11-01, UTC), or the last 7d, 4w.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show what was used: requests, tokens, and replicas' time on GPUs."""
    names = [part.value for part in by or (By.key, By.model)]
    day = _moment(since, back=True).astimezone(UTC).strftime("%Y-%m-%d") if since else "0000-00-00"
    rows = Client(Settings()).usage(",".join(names), day)
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name.upper(), no_wrap=True)
    for column in ("REQUESTS", "PROMPT TOKENS", "COMPLETION TOKENS", "CACHED TOKENS", "GPU SECONDS"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(*(getattr(row, name) or "-" for name in names), *_counts(row))
    print_whole(table)


def _counts(row: UsageLine) -> list[str]:
    counts = (row.requests, row.prompt_tokens, row.completion_tokens, row.cached_tokens)
    return [*(f"{count:,}" for count in counts), f"{row.gpu_seconds:,.0f}"]


def _moment(text: str, *, back: bool = False) -> datetime:
    """`30d` from now on (or `back`), or `2027-01-31`, `2027-01-31T12:00`. Raises Refused."""
    if match := DURATION.match(text):
        span = timedelta(**{UNITS[match[2]]: int(match[1])})
        return datetime.now(UTC) - span if back else datetime.now(UTC) + span
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise Refused(f"{text!r}: write a time like 30d, 12h or 2027-01-31", 422) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC) if back else found.astimezone()


def _shown(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().strftime("%Y-%m-%d %H:%M")
