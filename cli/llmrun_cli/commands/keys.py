"""`llmrun key …` and `llmrun usage`."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from llmrun.errors import Refused
from llmrun.identity import ADMIN_NAME
from llmrun.settings import Settings
from llmrun.wire import KeyChange, KeyInfo, Priority, Role, UsageLine
from llmrun_cli import local_cluster
from llmrun_cli.client import Client
from llmrun_cli.progress import starting_cluster
from llmrun_cli.terminal import AsJson, format_time, make_table, note, out, print_json, print_table

key = typer.Typer(
    no_args_is_help=True, help="Manage API keys.\n\nUntil the first key is created, requests need no authentication."
)
DURATION = re.compile(r"^(\d+)([smhdw])$")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


NEVER = "never"
Name = Annotated[str, typer.Argument(metavar="NAME", help="Key name.")]
Rpm = Annotated[int | None, typer.Option(metavar="N", min=0, help="Maximum requests per minute. 0 means unlimited.")]
Tpm = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Maximum tokens per minute, prompt and completion. 0 means unlimited."),
]
MaxInFlight = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Maximum concurrent requests. 0 means unlimited.")
]
MaxOutputTokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Maximum tokens that one request may generate. 0 means unlimited."),
]
Wake = Annotated[
    bool | None,
    typer.Option("--wake/--no-wake", help="Let requests wake cold models and keep models hot. Defaults to --wake."),
]
PriorityOption = Annotated[
    Priority | None,
    typer.Option(
        metavar="PRIORITY",
        help="Highest X-LLMRun-Priority of its requests: batch, normal or high. Defaults to normal.",
    ),
]
Expires = Annotated[
    str, typer.Option(metavar="WHEN", help="Lifetime (30d, 12h), date (2027-01-31), or never, the default.")
]


class By(StrEnum):
    """The fields that usage can be grouped by."""

    day = "day"
    key = "key"
    model = "model"
    adapter = "adapter"


@key.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Key name, shown in lists and usage.")],
    model: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Only allow this model (repeatable).")
    ] = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    max_in_flight: MaxInFlight = None,
    max_output_tokens: MaxOutputTokens = None,
    wake: Wake = None,
    priority: PriorityOption = None,
    expires: Expires = "",
    role: Annotated[
        Role,
        typer.Option(
            metavar="ROLE",
            help="What it opens: the models (user), status, logs and usage of the cluster (viewer), or everything "
            "(admin).",
        ),
    ] = "user",
) -> None:
    """Create an API key and print it once.

    Once a key exists, every request needs one.
    """
    fields = _fields(model, rpm, tpm, max_in_flight, max_output_tokens, wake, priority, expires)
    try:
        info = KeyInfo(name=name, role=role, **fields)
    except ValidationError:
        text = f"{name!r}: invalid key name; must be 1 to 63 lower-case letters, digits, '.', '_' and '-'"
        raise Refused(text, 422) from None
    if name == ADMIN_NAME:
        raise Refused("'admin' is reserved for the admin key; choose another name", 422)
    if role == "viewer" and fields.keys() - {"expires"}:
        raise Refused("a viewer's key opens no models, so it has no limits: remove the other options", 422)
    settings = Settings()
    local_cluster.ensure(settings, starting_cluster)
    created = Client(settings).create_key(info)
    note(f"Created key {name}. Save it now; it is not shown again:")
    print(created.key)


@key.command()
def update(
    name: Name,
    model: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Only allow this model (repeatable).")
    ] = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="Allow all models.")] = False,
    rpm: Rpm = None,
    tpm: Tpm = None,
    max_in_flight: MaxInFlight = None,
    max_output_tokens: MaxOutputTokens = None,
    wake: Wake = None,
    priority: PriorityOption = None,
    expires: Expires = "",
) -> None:
    """Change an API key's permissions and limits.

    The key itself stays as it is, and so does what no option names.
    """
    if model and all_models:
        raise Refused("--model and --all-models exclude each other", 422)
    fields = _fields([] if all_models else model, rpm, tpm, max_in_flight, max_output_tokens, wake, priority, expires)
    if not fields:
        raise Refused("nothing to change: add an option, for example `--rpm 60`. See `llmrun key update --help`", 422)
    Client(Settings()).change_key(name, KeyChange(**fields))
    out.print(f"Changed key {name}")


@key.command()
def rotate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Key name; `admin` is the admin key.")],
    keep: Annotated[
        str, typer.Option(metavar="DURATION", help="How long the old secret stays valid (1h, 7d). Defaults to 0s.")
    ] = "0s",
) -> None:
    """Give an API key a new secret and print it once.

    Its limits and usage stay. For `admin`, `admin.key` in the head's home is replaced; the old one ends at once.
    """
    match = DURATION.match(keep)
    if not match:
        raise Refused(f"{keep!r}: invalid duration; write for example 1h or 7d", 422)
    keep_s = timedelta(**{UNITS[match[2]]: int(match[1])}).total_seconds()
    if name == ADMIN_NAME and keep_s:
        raise Refused("the admin key's old secret cannot be kept: remove --keep", 422)
    rotated = Client(Settings()).rotate_key(name, keep_s)
    kept = f" The old one is valid for {keep}." if keep_s else ""
    note(f"Rotated key {name}.{kept} Save the new one now; it is not shown again:")
    print(rotated.key)


@key.command()
def disable(name: Name) -> None:
    """Reject an API key until it is enabled again."""
    Client(Settings()).change_key(name, KeyChange(disabled=True))
    out.print(f"Disabled key {name}")


@key.command()
def enable(name: Name) -> None:
    """Accept a disabled API key again."""
    Client(Settings()).change_key(name, KeyChange(disabled=False))
    out.print(f"Enabled key {name}")


def _fields(
    model: list[str] | None,
    rpm: int | None,
    tpm: int | None,
    max_in_flight: int | None,
    max_output_tokens: int | None,
    wake: bool | None,
    priority: Priority | None,
    expires: str,
) -> dict[str, Any]:
    """Return the fields of a key that options name."""
    given = {
        "models": None if model is None else tuple(model),
        "rpm": rpm,
        "tpm": tpm,
        "max_in_flight": max_in_flight,
        "max_output_tokens": max_output_tokens,
        "wake": wake,
        "priority": priority,
        "expires": None if not expires else 0 if expires == NEVER else _parse_time(expires).timestamp(),
    }
    return {name: value for name, value in given.items() if value is not None}


@key.command("list")
def list_(as_json: AsJson = False) -> None:
    """List API keys and their limits."""
    rows = Client(Settings()).keys()
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print("No keys; requests need no authentication. Create one with `llmrun key create NAME`.")
        return
    limit_names = ("RPM", "TPM", "MAX IN FLIGHT", "MAX OUTPUT")
    table = make_table("NAME", "ROLE", "MODELS", *limit_names, "WAKE", "PRIORITY", "EXPIRES", "CREATED")
    for row in rows:
        limits = [str(limit or "-") for limit in (row.rpm, row.tpm, row.max_in_flight, row.max_output_tokens)]
        expires = format_time(row.expires) if row.expires else "never"
        expires += " (expired)" if 0 < row.expires <= time.time() else ""
        expires = "disabled" if row.disabled else expires
        models = ", ".join(row.models) or ("-" if row.role == "viewer" else "all")
        wake = "yes" if row.wake else "no"
        table.add_row(row.name, row.role, models, *limits, wake, row.priority, expires, format_time(row.created))
    print_table(table)


@key.command()
def revoke(name: Name) -> None:
    """Revoke an API key.

    Takes effect within 2 seconds.
    """
    client = Client(Settings())
    client.revoke_key(name)
    out.print(f"Revoked key {name}")
    if not client.keys():
        note("No keys are left. Requests still need one; LLMRUN_REQUIRE_KEY=false opens the endpoint again.")


def usage(
    by: Annotated[
        list[By] | None,
        typer.Option(metavar="FIELD", help=f"Group by {', '.join(By)} (repeatable). Defaults to key and model."),
    ] = None,
    since: Annotated[
        str, typer.Option(metavar="WHEN", help="First day, in UTC (2026-11-01), or a duration (7d, 4w).")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show usage: requests, tokens and GPU time."""
    names = [field.value for field in by or (By.key, By.model)]
    day = _parse_time(since, past=True).astimezone(UTC).strftime("%Y-%m-%d") if since else "0000-00-00"
    rows = Client(Settings()).usage(",".join(names), day)
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print("No usage recorded.")
        return
    counts = ("REQUESTS", "PROMPT TOKENS", "COMPLETION TOKENS", "CACHED TOKENS", "GPU SECONDS")
    table = make_table(*(name.upper() for name in names), *counts, right=counts)
    for row in rows:
        table.add_row(*(getattr(row, name) or "-" for name in names), *_counts(row))
    print_table(table)


def _counts(row: UsageLine) -> list[str]:
    counts = (row.requests, row.prompt_tokens, row.completion_tokens, row.cached_tokens)
    return [*(f"{count:,}" for count in counts), f"{row.gpu_seconds:,.0f}"]


def _parse_time(text: str, *, past: bool = False) -> datetime:
    """Parse `2027-01-31`, `2027-01-31T12:00`, or `30d` from now (`past`: before now). Raises Refused."""
    if match := DURATION.match(text):
        duration = timedelta(**{UNITS[match[2]]: int(match[1])})
        return datetime.now(UTC) - duration if past else datetime.now(UTC) + duration
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Refused(f"{text!r}: invalid time; write a duration (30d, 12h) or a date (2027-01-31)", 422) from None
    if moment.tzinfo:
        return moment
    return moment.replace(tzinfo=UTC) if past else moment.astimezone()
