"""`llmrun export`: models as a Ray Serve config, for clusters without llmrun's control."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from llmrun.errors import AppError, SpecError
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun.standalone import check_standalone
from llmrun_cli import deployment
from llmrun_cli.app_files.python_file import LoadedModel
from llmrun_cli.client import Client
from llmrun_cli.terminal import warn

BUILDER = "llmrun_runtime.builders:build_openai_app"


def export(
    target: Annotated[str, typer.Argument(metavar="PATH[::NAME]", help="App file, or one of its models.")] = "",
    all_models: Annotated[
        bool, typer.Option("--all", help="Export all deployed models instead of an app file.")
    ] = False,
) -> None:
    """Print a Ray Serve config for models.

    `serve run` deploys it without llmrun's control and ingress.
    """
    if bool(target) == all_models:
        raise AppError("exactly one of an app file (`llmrun export app.py`) or --all is required")
    if all_models:
        path, selected = Path(), [LoadedModel(cls="", hooks=(), spec=spec) for spec in Client(Settings()).specs()]
    else:
        app = deployment.load(target)
        for warning in app.warnings:
            warn(warning)
        path, selected = app.path, app.models
    models = [_to_args(model, str(path.absolute())) for model in selected if _can_export(model.spec)]
    if not models:
        raise AppError("no models to export")
    application = {"name": "llmrun", "route_prefix": "/", "import_path": BUILDER, "args": {"models": models}}
    print(yaml.safe_dump({"applications": [application]}, sort_keys=False, allow_unicode=True), end="")


def _can_export(spec: ModelSpec) -> bool:
    """Return whether the model can be served without control; warn about what it loses."""
    if spec.code:
        warn(f"{spec.name} is skipped: its class's code is stored in control. Export its app file instead.")
        return False
    try:
        warning = check_standalone(spec)
    except SpecError as error:
        warn(f"skipped: {error}")
        return False
    if warning:
        warn(warning)
    return True


def _to_args(model: LoadedModel, file: str) -> dict[str, Any]:
    """Return the builder's arguments for a model: its fields, and the file of its hooks."""
    fields = model.spec.model_dump(mode="json", exclude_defaults=True, exclude={"code"})
    if not model.hooks:
        return fields
    hooks = " and ".join(model.hooks)
    warn(f"{model.spec.name}: {hooks} needs {file} at the same path on every node")
    return fields | {"app_file": file, "cls": model.cls, "hooks": list(model.hooks)}
