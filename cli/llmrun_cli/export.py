"""`llmrun export`: models as a `serve` config of Ray's, for clusters without llmrun's control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
import yaml

from llmrun.errors import AppError
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun_cli.client import Client
from llmrun_cli.deploy import choose
from llmrun_cli.load import Loaded
from llmrun_cli.terminal import note

BUILDER = "llmrun_runtime.builders:build_openai_app"


def export(
    target: Annotated[str, typer.Argument(metavar="[PATH[::NAME]]", help="An app file, or one of its models.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Everything that is deployed, in place of a file.")] = False,
) -> None:
    """Print the `serve` config that serves these models: `serve run` takes it, without llmrun's control and ingress."""
    if bool(target) == everything:
        raise AppError("say what: an app file, `llmrun export app.py`, or --all, which is all that is deployed")
    models = _deployed() if everything else _in_file(target)
    application = {"name": "llmrun", "route_prefix": "/", "import_path": BUILDER, "args": {"models": models}}
    print(yaml.safe_dump({"applications": [application]}, sort_keys=False, allow_unicode=True), end="")


def _in_file(target: str) -> list[dict[str, Any]]:
    path, loaded = choose(target)
    return [_fields(item.spec) | _code(item, str(path.absolute())) for item in loaded]


def _deployed() -> list[dict[str, Any]]:
    """Raises AppError if there is none."""
    specs: Sequence[ModelSpec] = Client(Settings()).specs()
    kept = [spec for spec in specs if not spec.code]
    for spec in specs:
        if spec.code:
            note(f"! {spec.name} is left out: its class's code lies in control: export its file", "yellow")
    if not kept:
        raise AppError("nothing is deployed that could be exported")
    return [_fields(spec) for spec in kept]


def _fields(spec: ModelSpec) -> dict[str, Any]:
    """What was said of a model."""
    return spec.model_dump(mode="json", exclude_defaults=True, exclude={"code"})


def _code(item: Loaded, file: str) -> dict[str, Any]:
    return {"app_file": file, "cls": item.cls, "hooks": list(item.hooks)} if item.hooks else {}
