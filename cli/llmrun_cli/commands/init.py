"""`llmrun init`: creates an app file from flags and, on a terminal, a few questions."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.prompt import Confirm, IntPrompt, Prompt

from llmrun.decorator import build_spec
from llmrun.errors import AppError, WeightsError
from llmrun.spec import to_label
from llmrun_cli.model_sizes import (
    GB,
    MAX_GPUS,
    MEMORY_GB,
    MODELS,
    SMALL,
    USES,
    Size,
    gpus_for,
    size_of,
    smallest_accelerator,
)
from llmrun_cli.terminal import err, make_table, note, out, print_table

# `any` is the default of `@llm`: a GPU of any kind if the cluster has one, else CPUs.
CPU, ANY = "cpu", "any"
NO_LORA = "-"
HUB = "https://huggingface.co"
ACCELERATORS = f"cpu, any, or one of {', '.join(MEMORY_GB)}"
T = TypeVar("T")


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File to create.")] = Path("app.py"),
    model: Annotated[str, typer.Option(metavar="SOURCE", help="org/model, a folder, or another source.")] = "",
    use: Annotated[str, typer.Option(metavar="USE", help=f"What the model is for: {', '.join(USES)}.")] = "",
    name: Annotated[str, typer.Option(metavar="NAME", help="Public model name.")] = "",
    accelerator: Annotated[str, typer.Option(metavar="KIND", help=f"Accelerator: {ACCELERATORS}.")] = "",
    gpus: Annotated[
        int,
        typer.Option(metavar="N", help="GPUs per replica (tensor parallelism). 0 means as many as the model needs."),
    ] = 0,
    lora: Annotated[
        str, typer.Option(metavar="SOURCE", help=f"Where LoRA adapters are stored, or {NO_LORA} for none.")
    ] = "",
    max_replicas: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of replicas. Defaults to 1.", show_default=False)
    ] = 0,
    keep_warm: Annotated[bool | None, typer.Option(help="Keep one replica running when idle.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    show_models: Annotated[bool, typer.Option("--list", help="List the suggested models and exit.")] = False,
) -> None:
    """Create an app file.

    On a terminal, prompts for anything not given as a flag.
    """
    if show_models:
        _list_models()
        return
    if path.exists() and not force:
        raise AppError(f"{path} already exists: choose another path, or use --force to overwrite it")
    interactive = sys.stdin.isatty()
    source = model or _choose_model(use, interactive=interactive)
    size = _size(source) if not (accelerator and (gpus or accelerator in (CPU, ANY))) else None
    kind = accelerator or _choose_accelerator(size, interactive=interactive)
    if kind not in (CPU, ANY) and kind not in MEMORY_GB:
        raise AppError(f"--accelerator {kind}: must be {ACCELERATORS}")
    count = 0 if kind in (CPU, ANY) else gpus or (gpus_for(size, kind) if size else 1)
    if interactive and count and not gpus:
        count = IntPrompt.ask("GPUs per replica", default=count, console=err)

    def ask(question: Callable[[], T], default: T) -> T:
        return question() if interactive else default

    adapters = lora or ask(
        lambda: Prompt.ask(f"LoRA adapters ({NO_LORA} for none)", default=NO_LORA, console=err), NO_LORA
    )
    replicas = max_replicas or ask(lambda: IntPrompt.ask("Maximum replicas", default=1, console=err), 1)
    warm = keep_warm
    if warm is None:
        warm = ask(lambda: Confirm.ask("Keep one replica running when idle", default=False, console=err), False)
    public_name = name or to_label(source.rstrip("/").rpartition("/")[2].partition("@")[0])
    options = {
        "name": public_name if name else None,
        "task": "embed" if source in MODELS and MODELS[source].use == "embed" else None,
        "accelerator": f"{kind}:{count}" if count > 1 else None if kind == ANY else kind,
        "lora": None if adapters == NO_LORA else adapters,
        "min_replicas": 1 if warm else None,
        "max_replicas": replicas if replicas > 1 else None,
    }
    arguments = {key: value for key, value in options.items() if value is not None}
    build_spec({"model": source, "name": public_name, **arguments})  # raises what a deploy would
    path.write_text(_render(source, public_name, arguments))
    out.print(
        f"Created {path}: {source} on {arguments.get('accelerator', 'any GPU, else CPUs')}"
        + (f", needs {size.required / GB:.0f} GB" if size else "")
    )
    note(f"Next: llmrun deploy {path}")


def _choose_model(use: str, *, interactive: bool) -> str:
    """Ask for a model, from the suggestions or another one. Raises AppError."""
    if use and use not in USES:
        raise AppError(f"--use {use}: must be one of {', '.join(USES)}")
    if not interactive:
        raise AppError(
            "--model is required when standard input is not a terminal: see the suggestions of `llmrun init --list`"
        )
    use = use or Prompt.ask("Use", choices=list(USES), default=USES[0], console=err)
    names = [name for name, model in MODELS.items() if model.use == use]
    for number, name in enumerate(names, 1):
        model = MODELS[name]
        err.print(f"  {number}  {name}  [dim]{model.size.weights / GB:.1f} GB {model.note}[/dim]")
    answer = Prompt.ask("Model (a number, or another org/model)", default="1", console=err)
    return names[int(answer) - 1] if answer.isdigit() and 0 < int(answer) <= len(names) else answer


def _size(source: str) -> Size | None:
    """Return the model's size, or None if its source cannot be inspected from here."""
    if source in MODELS:
        return MODELS[source].size
    if "://" in source:
        return None
    return size_of(source, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), os.environ.get("HF_TOKEN", ""))


def _choose_accelerator(size: Size | None, *, interactive: bool) -> str:
    best = ANY if not size or size.weights < SMALL else smallest_accelerator(size)
    if not interactive:
        return best
    for name, memory in {ANY: 0, CPU: 0, **MEMORY_GB}.items():
        try:
            count = f"{gpus_for(size, name)} required" if size and memory else ""
        except WeightsError:
            count = f"more than {MAX_GPUS} required"
        err.print(f"  {name}  [dim]{f'{memory} GB ' if memory else ''}{count}[/dim]")
    return Prompt.ask("Accelerator", choices=[ANY, CPU, *MEMORY_GB], default=best, console=err)


def _render(source: str, public_name: str, arguments: Mapping[str, str | int]) -> str:
    """Return the text of the app file."""
    lines = [f"    {key}={json.dumps(value, ensure_ascii=False)},\n" for key, value in arguments.items()]
    class_name = "".join(part.capitalize() for part in re.split(r"[^A-Za-z0-9]+", public_name) if part)
    class_name = class_name if class_name[:1].isalpha() else f"Model{class_name}"
    if "name" not in arguments and to_label(class_name) != public_name:  # the class name does not give the public name
        lines.insert(0, f'    name="{public_name}",\n')
    quoted = json.dumps(source, ensure_ascii=False)
    return f"from llmrun import llm\n\n\n@llm(\n    {quoted},\n{''.join(lines)})\nclass {class_name}: ...\n"


def _list_models() -> None:
    table = make_table("USE", "MODEL", "WEIGHTS", "FITS ON", "NOTE")
    for name, model in MODELS.items():
        kind = smallest_accelerator(model.size)
        count = gpus_for(model.size, kind)
        fits = f"{count} x {kind}" if count > 1 else kind
        table.add_row(model.use, name, f"{model.size.weights / GB:.1f} GB", fits, model.note)
    print_table(table)
