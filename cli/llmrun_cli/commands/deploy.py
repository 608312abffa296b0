"""`llmrun deploy`: from an app file to models that answer."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from llmrun.app_file import absolute
from llmrun.decorator import build_spec
from llmrun.errors import AppError, DeployError
from llmrun.settings import Settings
from llmrun.spec import DNS_LABEL, Code, ModelSpec, to_label
from llmrun.weights import is_path
from llmrun.wire import Change, DeployRequest, Plan
from llmrun_cli.app_files.package import pack
from llmrun_cli.app_files.python_file import LoadedModel, load_app
from llmrun_cli.app_files.yaml_file import SUFFIXES, read_yaml
from llmrun_cli.app_files.yaml_file import schema as app_schema
from llmrun_cli.client import Client
from llmrun_cli.commands import cluster
from llmrun_cli.progress import follow
from llmrun_cli.terminal import err, note, out

MARKS = {"add": ("+", "green"), "change": ("~", "yellow"), "tune": ("~", "yellow"), "remove": ("-", "red")}


def deploy(
    target: Annotated[str, typer.Argument(metavar="PATH[::NAME] | ORG/MODEL", help="An app file, or a model.")],
    flags: Annotated[list[str] | None, typer.Argument(metavar="[-- ENGINE FLAGS]", help="With a model only.")] = None,
    name: Annotated[str, typer.Option(help="The app's name, by default the file's (a model's own).")] = "",
    accelerator: Annotated[str, typer.Option(help="With a model only: as in @llm.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove models that are no longer in the file.")] = False,
    adopt: Annotated[bool, typer.Option("--adopt", help="Take over an app deployed from another place.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the diff and stop.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until the models answer.")] = False,
    lazy: Annotated[bool, typer.Option("--lazy", help="Start nothing now: the first request does.")] = False,
) -> None:
    """Deploy the models of an app file, or one model without a file.

    Shows what would change, asks, then starts one replica of each changed model as proof.
    """
    settings = Settings()
    if _is_file(target):
        if flags or accelerator:
            raise AppError("engine flags and --accelerator go with a model's name; for a file, write them in @llm")
        request, packages = _from_file(target, name)
    else:
        request, packages = _from_model(target, name, accelerator, flags or []), {}
    request = request.model_copy(update={"prune": prune, "adopt": adopt, "lazy": lazy})
    cluster.ensure(settings)
    client = Client(settings)
    for digest, data in packages.items():
        if not client.has_package(digest):
            client.put_package(digest, data)
    plan = client.plan(request)
    removals = [change.model for change in plan.changes if change.kind == "remove"]
    changed = [change for change in plan.changes if change.kind not in ("same", "remove")]
    _show(plan, prune)
    if dry_run:
        if not changed and not removals:
            out.print(f"{plan.app}: nothing would change")
        return
    interactive = sys.stdin.isatty() and not yes
    if removals and interactive and not prune:
        question = f"Remove {', '.join(removals)}, no longer in the file?"
        request = request.model_copy(update={"prune": typer.confirm(question, default=False, err=True)})
    if not changed and not (removals and request.prune):
        out.print(f"{plan.app}: nothing has changed" + (f" (kept: {', '.join(removals)})" if removals else ""))
        return
    if interactive and changed and not typer.confirm("Deploy?", default=True, err=True):
        raise typer.Exit(1)
    if removals and not request.prune:
        note(f"kept, though no longer in the file: {', '.join(removals)} (--prune removes)", "yellow")
    deploy_id = client.deploy(request.model_copy(update={"plan": plan.fingerprint}))
    if no_wait:
        out.print(f"deploying {plan.app}: `llmrun status` shows how it goes")
        return
    _follow(client, deploy_id)


def schema() -> None:
    """Print the JSON schema of an app file in YAML, for editors."""
    print(json.dumps(app_schema(), indent=2))


def _is_file(target: str) -> bool:
    """Whether it names an app file; else a model: `org/model`, or a folder of weights."""
    path = target.partition("::")[0]
    if "://" in path or Path(path).expanduser().is_dir():
        return False
    return path.endswith((".py", *SUFFIXES)) or is_path(path) or Path(path).exists()


def _from_file(target: str, name: str) -> tuple[DeployRequest, dict[str, bytes]]:
    """The request for `PATH[::Name]`, and the code packages that it needs. Raises AppError."""
    path, loaded = choose(target)
    path = path.absolute()
    packages: dict[str, bytes] = {}
    digest = ""
    if any(item.needs_code for item in loaded):
        weights = {Path(item.spec.path).expanduser() for item in loaded if item.spec.path}  # used in place
        digest, package = pack(path.parent, leave_out=weights)
        packages[digest] = package
    request = DeployRequest(
        app=_app_name(name, path.parent.name if path.stem == "app" else path.stem),
        source=f"{socket.gethostname()}:{path}",
        specs=tuple(_with_code(item, path, digest) for item in loaded),
        only="::" in target,
    )
    return request, packages


def choose(target: str) -> tuple[Path, list[LoadedModel]]:
    """The file of `PATH[::Name]`, and its models, or that one. Raises AppError."""
    text, colons, only = target.partition("::")
    path = Path(text).expanduser()
    loaded = _load(path)
    chosen = [item for item in loaded if not colons or only in (item.cls, *item.spec.served_names)]
    if not chosen:
        names = ", ".join(f"{item.cls} ({item.spec.name})" for item in loaded)
        raise AppError(f"{path} has no model {only!r}: it has {names}")
    return path, chosen


def _load(path: Path) -> list[LoadedModel]:
    """The models of a file. Raises AppError."""
    if path.suffix not in SUFFIXES:
        return load_app(path)
    specs, left_out = read_yaml(path)
    for line in left_out:
        note(f"! {line}", "yellow")
    return [LoadedModel(cls=spec.name, hooks=(), spec=absolute(spec, path.absolute().parent)) for spec in specs]


def _app_name(said: str, default: str) -> str:
    """The app's name, as said or made of the default. Raises AppError."""
    if said and not DNS_LABEL.fullmatch(said):
        raise AppError(f"--name {said!r}: a name is a DNS label: 1 to 63 lower-case letters, digits and '-'")
    if not (said or to_label(default)):
        raise AppError(f"{default!r} gives no name: add --name NAME")
    return said or to_label(default)


def _with_code(item: LoadedModel, path: Path, digest: str) -> ModelSpec:
    if not item.needs_code:
        return item.spec
    code = Code(package=digest, file=path.name, cls=item.cls, hooks=item.hooks)
    return item.spec.model_copy(update={"code": code})


def _from_model(target: str, name: str, accelerator: str, flags: list[str]) -> DeployRequest:
    """The request for a model without a file. Raises AppError or SpecError."""
    if Path(target).expanduser().is_dir():
        target = str(Path(target).expanduser().absolute())
    elif _without_revision(target).count("/") != 1 and "://" not in target:
        raise AppError(f"{target}: there is no such file, and a model's name looks like org/model")
    label = _app_name(name, _without_revision(target).rstrip("/").rpartition("/")[2])
    fields = {"model": target, "name": label, "accelerator": accelerator or None, "engine_args": flags}
    return DeployRequest(app=label, source="cli", specs=(build_spec(fields),))


def _without_revision(target: str) -> str:
    """`org/model@refs/pr/1` → `org/model`; other sources have no revision."""
    return target if "://" in target and not target.startswith("hf://") else target.partition("@")[0]


def _show(plan: Plan, prune: bool) -> None:
    """The diff."""
    for change in plan.changes:
        if change.kind == "same":
            continue
        mark, style = MARKS[change.kind]
        err.print(Text(f"{mark} {_headline(change)}", style=style))
        if change.kind in ("change", "tune"):
            for line in change.lines:
                err.print(Text(f"    {line}", style=style))
        if change.kind == "remove" and not prune:
            err.print(Text("    no longer in the file", style="dim"))


def _headline(change: Change) -> str:
    if change.kind == "add":
        return f"{change.model}  {change.lines[0]}, on {change.placement}"
    if change.kind == "change":
        return f"{change.model}  (a new engine, on {change.placement})"
    return f"{change.model}  (no restart)" if change.kind == "tune" else change.model


def _follow(client: Client, job_id: str) -> None:
    """Show a deploy's events until its end. Raises DeployError if a model did not start."""
    failed: list[str] = []
    ready = ""
    for event in follow(client, job_id, "deploy"):
        if event.kind == "failed":
            failed.append(f"{event.model}: {event.text}" if event.model else event.text)
            continue
        mark, style = {"unproven": ("!", "yellow"), "removed": ("-", "red")}.get(event.kind, ("✓", "green"))
        verb = {"ready": "ready", "removed": "removed", "tuned": "changed"}.get(event.kind, "")
        words = ", ".join(word for word in (verb, event.text) if word)
        note(f"{mark} {event.model} {words}", style)
        if event.kind != "removed":
            ready = ready or event.model
    if ready:
        out.print(_next_steps(client.url, ready))
    if failed:
        raise DeployError("\n       ".join(failed))


def _next_steps(url: str, model: str) -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return f"\n{url}/v1\n\ncurl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
