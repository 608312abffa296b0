"""Shows a deploy on the terminal: its plan, its progress and how to call the models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.text import Text

from llmrun.errors import DeployError
from llmrun.wire import Change, Event, Plan
from llmrun_cli.app_files.package import CodePackage
from llmrun_cli.progress import show_progress
from llmrun_cli.terminal import err, note, out

CHANGE_MARKS = {"add": ("+", "green"), "change": ("~", "yellow"), "tune": ("~", "yellow"), "remove": ("-", "red")}
EVENT_MARKS = {"unproven": ("!", "yellow"), "removed": ("-", "red")}
SHOWN_FILES = 8
EVENT_VERBS = {"ready": "ready", "removed": "removed", "tuned": "changed"}


def show_plan(plan: Plan, *, prune: bool = False) -> None:
    """Print the diff."""
    for change in plan.changes:
        if change.kind == "same":
            continue
        mark, style = CHANGE_MARKS.get(change.kind, ("~", "yellow"))
        err.print(Text(f"{mark} {_headline(change)}", style=style))
        if change.kind in ("change", "tune"):
            for line in change.lines:
                err.print(Text(f"    {line}", style=style))
        if change.kind == "remove" and not prune:
            err.print(Text("    no longer in the file", style="dim"))


def show_code(code: CodePackage, *, whole: bool) -> None:
    """Print which files go to the nodes, and which were left out; with `whole`, all of their names."""
    count = f"{len(code.files)} file{'s' if len(code.files) > 1 else ''}"
    note(f"  code: {count}, {len(code.data) / 2**10:.0f} KiB: {_listed(code.files, whole=whole)}", "dim")
    if code.secrets:
        note(f"  left out, may contain secrets: {_listed(code.secrets, whole=whole)}", "yellow")


def _listed(names: Sequence[str], *, whole: bool) -> str:
    shown = names if whole else names[:SHOWN_FILES]
    more = f" and {len(names) - len(shown)} more (`--dry-run` lists all)" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def _headline(change: Change) -> str:
    if change.kind == "add":
        return f"{change.model}  {change.lines[0]}, on {change.placement}"
    if change.kind == "change":
        return f"{change.model}  (new engine, on {change.placement})"
    return f"{change.model}  (no restart)" if change.kind == "tune" else change.model


def show_events(events: Iterable[Event], operation: str, url: str) -> None:
    """Print the events of the deploy with that id, then how to call its first model.

    Raises DeployError if models failed. Ctrl-C leaves the deploy running and raises KeyboardInterrupt.
    """
    first = ""
    hint = f"check it with `llmrun deploy list`, cancel it with `llmrun deploy cancel {operation}`"
    try:
        for event in show_progress(events, "deploy", hint):
            mark, style = EVENT_MARKS.get(event.kind, ("✓", "green"))
            result = ", ".join(text for text in (EVENT_VERBS.get(event.kind, ""), event.text) if text)
            note(f"{mark} {event.model} {result}", style)
            if event.kind != "removed":
                first = first or event.model
    except DeployError:
        _show_example(url, first)
        raise
    _show_example(url, first)


def _show_example(url: str, model: str) -> None:
    if not model:
        return
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    out.print(f"\n{url}/v1\n\ncurl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
