"""`llmrun export`: models as a `serve` config of Ray's, for clusters without llmrun's control."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from llmrun.errors import AppError
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun.standalone import lost_alone, refused_alone
from llmrun_cli.app_files.python_file import LoadedModel
from llmrun_cli.client import Client
from llmrun_cli.commands.deploy import choose
from llmrun_cli.terminal import note

BUILDER = "llmrun_runtime.builders:build_openai_app"


def export(
    target: Annotated[str, typer.Argument(metavar="[PATH[::NAME]]", help="An app file, or one of its models.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Everything that is deployed, in place of a file.")] = False,
) -> None:
    """Print the `serve` config that serves these models: `serve run` takes it, without llmrun's control and ingress."""
    if bool(target) == everything:
        raise AppError("say what: an app file, `llmrun export app.py`, or --all, which is all that is deployed")
    path, found = (Path(), _deployed()) if everything else choose(target)
    models = [_written(item, str(path.absolute())) for item in found if _can_be_alone(item.spec)]
    if not models:
        raise AppError("there is nothing that could be exported")
    application = {"name": "llmrun", "route_prefix": "/", "import_path": BUILDER, "args": {"models": models}}
    print(yaml.safe_dump({"applications": [application]}, sort_keys=False, allow_unicode=True), end="")


def _deployed() -> list[LoadedModel]:
    return [LoadedModel(cls="", hooks=(), spec=spec) for spec in Client(Settings()).specs()]


def _can_be_alone(spec: ModelSpec) -> bool:
    """Whether the model can be served without control; what is lost is said."""
    if spec.code:
        note(f"! {spec.name} is left out: its class's code lies in control: export its file", "yellow")
        return False
    if why := refused_alone(spec):
        note(f"! left out: {why}", "yellow")
        return False
    if lost := lost_alone(spec):
        note(f"! {lost}", "yellow")
    return True


def _written(item: LoadedModel, file: str) -> dict[str, Any]:
    """What was said of a model, and where the code is that runs beside its engine."""
    fields = item.spec.model_dump(mode="json", exclude_defaults=True, exclude={"code"})
    if not item.hooks:
        return fields
    hooks = " and ".join(item.hooks)
    note(f"! {item.spec.name}: for {hooks} {file} must lie there on every node", "yellow")
    return fields | {"app_file": file, "cls": item.cls, "hooks": list(item.hooks)}
