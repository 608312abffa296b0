"""`llmrun init`: asks a few questions, or takes flags, and writes an app file."""

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
from rich.table import Table

from llmrun.decorator import build_spec
from llmrun.errors import AppError, WeightsError
from llmrun.spec import to_label
from llmrun_cli.model_sizes import GB, MEMORY_GB, MODELS, SMALL, USES, Size, gpus_for, size_of, smallest
from llmrun_cli.terminal import err, note, out, print_whole

# `any`: what `@llm` does if nothing is said, a GPU of any kind if the cluster has one, else CPUs.
CPU, ANY = "cpu", "any"
HUB = "https://huggingface.co"
T = TypeVar("T")


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("app.py"),
    model: Annotated[str, typer.Option(help="org/model, a folder, or another source; without it, a choice.")] = "",
    use: Annotated[str, typer.Option(help=f"What for: {', '.join(USES)}.")] = "",
    name: Annotated[str, typer.Option(help="What clients call it.")] = "",
    accelerator: Annotated[str, typer.Option(help=f"cpu, any, or one of {', '.join(MEMORY_GB)}.")] = "",
    gpus: Annotated[int, typer.Option(help="GPUs for each replica (tensor parallel); 0: what the model wants.")] = 0,
    lora: Annotated[str, typer.Option(help="Where LoRA adapters lie; - for none.")] = "",
    max_replicas: Annotated[int, typer.Option(help="Replicas at most.")] = 0,
    keep_warm: Annotated[bool | None, typer.Option(help="Keep one replica when nobody asks.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    models: Annotated[bool, typer.Option("--list", help="Show the models to choose from, and stop.")] = False,
) -> None:
    """Write an app file. On a terminal it asks for what no flag says."""
    if models:
        _list()
        return
    if path.exists() and not force:
        raise AppError(f"{path} is there already: name another file, or --force")
    asks = sys.stdin.isatty()
    chosen = model or _choose(use, asks=asks)
    size = _size(chosen) if not (accelerator and (gpus or accelerator in (CPU, ANY))) else None
    kind = accelerator or _accelerator(size, asks=asks)
    if kind not in (CPU, ANY) and kind not in MEMORY_GB:
        raise AppError(f"--accelerator {kind}: cpu, any, or one of {', '.join(MEMORY_GB)}")
    count = 0 if kind in (CPU, ANY) else gpus or (gpus_for(size, kind) if size else 1)
    if asks and count and not gpus:
        count = IntPrompt.ask("GPUs for each replica", default=count, console=err)
    adapters = lora or _ask(
        asks, lambda: Prompt.ask("LoRA adapters lie at (- for none)", default="-", console=err), "-"
    )
    most = max_replicas or _ask(asks, lambda: IntPrompt.ask("Replicas at most", default=1, console=err), 1)
    warm = keep_warm
    if warm is None:
        warm = _ask(asks, lambda: Confirm.ask("Keep one when nobody asks", default=False, console=err), False)
    called = name or to_label(chosen.rstrip("/").rpartition("/")[2].partition("@")[0])
    options = {
        "name": called if name else None,
        "task": "embed" if chosen in MODELS and MODELS[chosen].use == "embed" else None,
        "accelerator": f"{kind}:{count}" if count > 1 else None if kind == ANY else kind,
        "lora": None if adapters == "-" else adapters,
        "min_replicas": 1 if warm else None,
        "max_replicas": most if most > 1 else None,
    }
    said = {key: value for key, value in options.items() if value is not None}
    build_spec({"model": chosen, "name": called, **said})  # raises what a deploy would
    path.write_text(_text(chosen, called, said))
    out.print(
        f"{path}: {chosen} on {said.get('accelerator', 'any GPU, else CPUs')}"
        + (f", {size.wanted / GB:.0f} GB wanted" if size else "")
    )
    note(f"next: llmrun deploy {path}")


def _ask(asks: bool, question: Callable[[], T], otherwise: T) -> T:
    return question() if asks else otherwise


def _choose(use: str, *, asks: bool) -> str:
    """A model: from the list, or another one. Raises AppError."""
    if use and use not in USES:
        raise AppError(f"--use {use}: one of {', '.join(USES)}")
    if not asks:
        raise AppError("without a terminal, say --model (`llmrun init --list` shows some)")
    use = use or Prompt.ask("What for", choices=list(USES), default=USES[0], console=err)
    names = [name for name, known in MODELS.items() if known.use == use]
    for number, name in enumerate(names, 1):
        known = MODELS[name]
        err.print(f"  {number}  {name}  [dim]{known.size.weights / GB:.1f} GB {known.note}[/dim]")
    said = Prompt.ask("Which (a number, or another org/model)", default="1", console=err)
    return names[int(said) - 1] if said.isdigit() and 0 < int(said) <= len(names) else said


def _size(model: str) -> Size | None:
    """None of a source that cannot be looked at from here."""
    if model in MODELS:
        return MODELS[model].size
    if "://" in model:
        return None
    return size_of(model, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), os.environ.get("HF_TOKEN", ""))


def _accelerator(size: Size | None, *, asks: bool) -> str:
    best = ANY if not size or size.weights < SMALL else smallest(size)
    if not asks:
        return best
    for name, memory in {ANY: 0, CPU: 0, **MEMORY_GB}.items():
        try:
            count = f"{gpus_for(size, name)} of them" if size and memory else ""
        except WeightsError:
            count = "not even 8 of them"
        err.print(f"  {name}  [dim]{f'{memory} GB ' if memory else ''}{count}[/dim]")
    return Prompt.ask("Accelerator", choices=[ANY, CPU, *MEMORY_GB], default=best, console=err)


def _text(model: str, called: str, said: Mapping[str, str | int]) -> str:
    """The app file."""
    lines = [f"    {key}={json.dumps(value, ensure_ascii=False)},\n" for key, value in said.items()]
    cls = "".join(part.capitalize() for part in re.split(r"[^A-Za-z0-9]+", called) if part)
    cls = cls if cls[:1].isalpha() else f"Model{cls}"
    if "name" not in said and to_label(cls) != called:  # the class's name alone would call it otherwise
        lines.insert(0, f'    name="{called}",\n')
    source = json.dumps(model, ensure_ascii=False)
    return f"from llmrun import llm\n\n\n@llm(\n    {source},\n{''.join(lines)})\nclass {cls}: ...\n"


def _list() -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("USE", "MODEL", "WEIGHTS", "FITS", ""):
        table.add_column(column, no_wrap=True)
    for name, known in MODELS.items():
        kind = smallest(known.size)
        count = gpus_for(known.size, kind)
        fits = f"{count} x {kind}" if count > 1 else kind
        table.add_row(known.use, name, f"{known.size.weights / GB:.1f} GB", fits, known.note)
    print_whole(table)
