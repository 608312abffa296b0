"""The `llmrun` command: its subcommands, and how errors are shown."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import llmrun
from llmrun.errors import AppError, LLMRunError
from llmrun_cli.commands import (
    adapters,
    audit,
    backup,
    chat,
    cluster,
    dashboards,
    deploy,
    export,
    init,
    keys,
    models,
    weights,
)
from llmrun_cli.terminal import error_line


class Commands(TyperGroup):
    """Commands of which some have two words: `deploy list` next to `deploy PATH`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the first two arguments if they are a command."""
        words = " ".join(args[:2])
        return super().parse_args(ctx, [words, *args[2:]] if words in self.commands else args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Deploy LLMs from a Python file to your own machines, behind one OpenAI-compatible endpoint.",
)
app.command()(deploy.deploy)
app.command("deploy list")(deploy.list_)
app.command("deploy cancel")(deploy.cancel)
app.command()(deploy.schema)
app.command()(export.export)
app.command()(init.init)
app.command()(models.status)
app.command()(chat.chat)
app.command()(models.warm)
app.command()(models.unload)
app.command()(models.logs)
app.command()(models.delete)
app.add_typer(weights.weights, name="weights")
app.add_typer(adapters.adapter, name="adapter")
app.add_typer(keys.key, name="key")
app.command()(keys.usage)
app.command()(audit.audit)
app.command()(dashboards.dashboards)
app.command()(cluster.up)
app.command()(cluster.restart)
app.command()(cluster.down)
app.command()(backup.backup)
app.command()(backup.restore)


def _version(show: bool) -> None:
    if show:
        print(f"llmrun {llmrun.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before a subcommand."""


def main() -> None:
    """Run the command line. Prints an LLMRunError as one line on standard error and exits with 1."""
    try:
        app()
    except LLMRunError as error:
        if isinstance(error, AppError) and error.detail:
            print(error.detail, file=sys.stderr)
        error_line(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
