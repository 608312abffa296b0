"""`llmrun deploy`, `llmrun deploy list`, `llmrun deploy cancel` and `llmrun schema`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Annotated

import typer

from llmrun.errors import AppError
from llmrun.settings import Settings
from llmrun.spec import literal_secrets
from llmrun_cli import deployment, local_cluster
from llmrun_cli.app_files.yaml_file import schema as app_schema
from llmrun_cli.client import Client, user
from llmrun_cli.deploy_output import show_code, show_events, show_plan
from llmrun_cli.progress import starting_cluster
from llmrun_cli.terminal import (
    AsJson,
    Yes,
    exit_on_interrupt,
    format_time,
    make_table,
    note,
    out,
    print_json,
    print_table,
    warn,
)


def deploy(
    target: Annotated[
        str, typer.Argument(metavar="PATH[::NAME] | ORG/MODEL", help="App file, or a model to deploy without one.")
    ],
    engine_args: Annotated[
        list[str] | None, typer.Argument(metavar="-- ENGINE_ARGS", help="Engine arguments (only with ORG/MODEL).")
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="App name. Defaults to the file's or the model's.")] = "",
    accelerator: Annotated[
        str, typer.Option(metavar="KIND[:N]", help="Accelerator, as in @llm (only with ORG/MODEL).")
    ] = "",
    yes: Yes = False,
    prune: Annotated[bool, typer.Option("--prune", help="Delete models that are no longer in the file.")] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take ownership of an app deployed from another path.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the diff without deploying.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Don't wait for the models to be ready.")] = False,
    lazy: Annotated[bool, typer.Option("--lazy", help="Don't start replicas; the first request will.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Without room for a proof, drain the active version before it.")
    ] = False,
) -> None:
    """Deploy the models of an app file, or a single model.

    Shows the changes, asks for confirmation, then starts one replica of each changed model as proof.

    `llmrun deploy list` shows the running deploys; `llmrun deploy cancel ID` ends one.
    """
    if force and lazy:
        raise AppError("--force and --lazy exclude each other: --lazy replaces without a proof")
    settings = Settings()
    if not deployment.is_app_file(target):
        prepared = deployment.from_model(target, name, accelerator, engine_args or [])
    elif engine_args or accelerator:
        raise AppError("engine arguments and --accelerator require ORG/MODEL: for an app file, set them in @llm")
    else:
        prepared = deployment.from_file(target, name)
    for warning in (*prepared.warnings, *literal_secrets(prepared.request.specs)):
        warn(warning)
    request = prepared.request.model_copy(update={"prune": prune, "adopt": adopt, "lazy": lazy, "force": force})
    prepared = replace(prepared, request=request)
    local_cluster.ensure(settings, starting_cluster)
    client = Client(settings)
    plan = deployment.make_plan(client, prepared)
    changed, removed = deployment.changed(plan), ", ".join(deployment.removed(plan))
    show_plan(plan, prune=prune)
    if prepared.code and changed:
        show_code(prepared.code, whole=dry_run)
    if dry_run:
        if not changed and not removed:
            out.print(f"{plan.app}: no changes")
        return
    interactive = sys.stdin.isatty() and not yes
    if removed and interactive and not prune:
        question = f"Delete {removed}, no longer in the file?"
        request = request.model_copy(update={"prune": typer.confirm(question, default=False, err=True)})
    if not changed and not (removed and request.prune):
        out.print(f"{plan.app}: no changes" + (f" (kept: {removed})" if removed else ""))
        return
    if interactive and changed and not typer.confirm("Deploy?", default=True, err=True):
        raise typer.Exit(1)
    if removed and not request.prune:
        note(f"Kept, though no longer in the file: {removed}. Delete with --prune.", "yellow")
    operation = deployment.start(client, request.model_copy(update={"unattended": not interactive}), plan)
    if no_wait:
        out.print(f"Deploying {plan.app} (deploy {operation}). Check progress with `llmrun deploy list`.")
        return
    with exit_on_interrupt():
        show_events(deployment.follow(client, operation), operation, client.url)


def list_(as_json: AsJson = False) -> None:
    """List running and recent deploys, the newest first."""
    rows = Client(Settings()).deploys()
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print("No deploys since control started.")
        return
    table = make_table("ID", "APP", "STATE", "STARTED", "BY", "STEP")
    for row in rows:
        table.add_row(row.id, row.app, row.state, format_time(row.started), row.by or "-", row.step or "-")
    print_table(table)


def cancel(
    deploy_id: Annotated[str, typer.Argument(metavar="ID", help="Deploy ID, as `llmrun deploy list` shows it.")],
) -> None:
    """Cancel a running deploy.

    Active versions stay active. A download that has begun continues in its node's cache.
    """
    app = Client(Settings()).cancel_deploy(deploy_id, user())
    out.print(f"Cancelled deploy {deploy_id} of {app}")


def schema() -> None:
    """Print the JSON schema for YAML app files."""
    print(json.dumps(app_schema(), indent=2))
