"""Deploys models: from an app file or a model's source to an operation that control runs. Prints nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmrun.app_file import resolve_paths
from llmrun.decorator import build_spec
from llmrun.errors import AppError, DeployError
from llmrun.spec import DNS_LABEL, Code, ModelSpec, to_label
from llmrun.weights import is_path
from llmrun.wire import Change, DeployRequest, Event, Plan
from llmrun_cli.app_files.package import CodePackage, hidden_modules, pack
from llmrun_cli.app_files.python_file import LoadedModel, load_app
from llmrun_cli.app_files.yaml_file import SUFFIXES as YAML_SUFFIXES
from llmrun_cli.app_files.yaml_file import read_yaml
from llmrun_cli.client import Client, user


@dataclass(frozen=True)
class LoadedApp:
    """The selected models of an app file, and warnings about the file."""

    path: Path
    models: list[LoadedModel]
    warnings: list[str]


@dataclass(frozen=True)
class PreparedDeploy:
    """A deploy request, the code package that it refers to, and warnings about the app file."""

    request: DeployRequest
    code: CodePackage | None = None
    warnings: Sequence[str] = ()


def is_app_file(target: str) -> bool:
    """Return whether a target names an app file, as opposed to `org/model` or a folder of weights."""
    path = target.partition("::")[0]
    if "://" in path or Path(path).expanduser().is_dir():
        return False
    return path.endswith((".py", *YAML_SUFFIXES)) or is_path(path) or Path(path).exists()


def load(target: str) -> LoadedApp:
    """Load the models of `PATH`, or the one of `PATH::NAME`. Raises AppError."""
    text, separator, name = target.partition("::")
    path = Path(text).expanduser()
    app = _load_file(path)
    selected = [model for model in app.models if not separator or name in (model.cls, *model.spec.served_names)]
    if not selected:
        available = ", ".join(f"{model.cls} ({model.spec.name})" for model in app.models)
        raise AppError(f"{path}: model {name!r} not found; available: {available}")
    return LoadedApp(path, selected, app.warnings)


def _load_file(path: Path) -> LoadedApp:
    if path.suffix not in YAML_SUFFIXES:
        models, warnings = load_app(path)
        return LoadedApp(path, models, warnings)
    specs, warnings = read_yaml(path)
    folder = path.absolute().parent
    return LoadedApp(
        path, [LoadedModel(cls=spec.name, hooks=(), spec=resolve_paths(spec, folder)) for spec in specs], warnings
    )


def from_file(target: str, app_name: str = "") -> PreparedDeploy:
    """Prepare a deploy of `PATH[::NAME]`; packs the file's folder if a class has code. Raises AppError."""
    app = load(target)
    path = app.path.absolute()
    code, warnings = None, list(app.warnings)
    if any(model.needs_code for model in app.models):
        weights = {Path(model.spec.path).expanduser() for model in app.models if model.spec.path}  # used in place
        code = pack(path.parent, exclude=weights)
        warnings += hidden_modules(code)
    request = DeployRequest(
        app=_app_name(app_name, path.parent.name if path.stem == "app" else path.stem),
        source=f"{socket.gethostname()}:{path}",
        specs=tuple(_spec_with_code(model, path, code) for model in app.models),
        only="::" in target,
    )
    return PreparedDeploy(request, code, warnings)


def from_model(
    target: str, app_name: str = "", accelerator: str = "", engine_args: Sequence[str] = ()
) -> PreparedDeploy:
    """Prepare a deploy of a model without an app file. Raises AppError or SpecError."""
    if Path(target).expanduser().is_dir():
        target = str(Path(target).expanduser().absolute())
    elif _without_revision(target).count("/") != 1 and "://" not in target:
        raise AppError(f"{target}: file not found, and not a model name like org/model")
    label = _app_name(app_name, _without_revision(target).rstrip("/").rpartition("/")[2])
    fields = {"model": target, "name": label, "accelerator": accelerator or None, "engine_args": list(engine_args)}
    return PreparedDeploy(DeployRequest(app=label, source="cli", specs=(build_spec(fields),)))


def make_plan(client: Client, prepared: PreparedDeploy) -> Plan:
    """Upload the code package if control does not have it; return the changes that the deploy would make."""
    if prepared.code and not client.has_package(prepared.code.digest):
        client.put_package(prepared.code.digest, prepared.code.data)
    return client.plan(prepared.request)


def changed(plan: Plan) -> list[Change]:
    """Return the models that the plan adds or changes."""
    return [change for change in plan.changes if change.kind not in ("same", "remove")]


def removed(plan: Plan) -> list[str]:
    """Return the names of models that are deployed but no longer in the file; only `prune` deletes them."""
    return [change.model for change in plan.changes if change.kind == "remove"]


def start(client: Client, request: DeployRequest, plan: Plan) -> str:
    """Start the deploy; return the operation's id. Control refuses if it would no longer do what `plan` shows."""
    return client.deploy(request.model_copy(update={"plan": plan.fingerprint, "by": user()}))


def follow(client: Client, operation: str) -> Iterator[Event]:
    """Yield the operation's events until it ends. Raises DeployError at the end if models failed."""
    failures: list[str] = []
    for event in client.events(operation):
        if event.kind == "failed":
            failures.append(f"{event.model}: {event.text}" if event.model else event.text)
        else:
            yield event
    if failures:
        raise DeployError("\n       ".join(failures))


def _app_name(name: str, default: str) -> str:
    """Return the app's name, or one made from the default. Raises AppError."""
    if name and not DNS_LABEL.fullmatch(name):
        raise AppError(f"--name {name!r}: must be a DNS label: 1 to 63 lower-case letters, digits and hyphens")
    if not (name or to_label(default)):
        raise AppError(f"cannot make an app name from {default!r}: set --name")
    return name or to_label(default)


def _spec_with_code(model: LoadedModel, path: Path, package: CodePackage | None) -> ModelSpec:
    if not model.needs_code or not package:
        return model.spec
    code = Code(package=package.digest, file=path.name, cls=model.cls, hooks=model.hooks)
    return model.spec.model_copy(update={"code": code})


def _without_revision(target: str) -> str:
    """Strip the revision of a Hugging Face source: `org/model@refs/pr/1` → `org/model`."""
    return target if "://" in target and not target.startswith("hf://") else target.partition("@")[0]
