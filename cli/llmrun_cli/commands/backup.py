"""`llmrun backup` and `llmrun restore`: copy a home's models, keys and usage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrun.settings import Settings
from llmrun_cli import local_cluster
from llmrun_cli.terminal import err, format_time, out


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write. It contains the admin key.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Back up this machine's cluster to a file: models, code, keys and usage.

    Contains no weights. The cluster may run meanwhile.
    """
    with err.status(f"Writing {file}"):
        done = local_cluster.back_up(file, force=force)
    out.print(f"Backed up {_count(done)} to {file} ({file.stat().st_size / 2**20:.1f} MiB). Keep it secret.")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File that `llmrun backup` wrote.")],
    force: Annotated[bool, typer.Option("--force", help="Replace existing models and API keys.")] = False,
) -> None:
    """Restore models, code, keys and usage from a backup.

    The cluster must be stopped. `llmrun up` then starts the restored models.
    """
    with err.status(f"Restoring {file}"):
        done = local_cluster.restore(file, force=force)
    written = format_time(done["created"])
    out.print(f"Restored {_count(done)} of {written} into {Settings().root}. Start them with `llmrun up`.")


def _count(done: dict[str, float]) -> str:
    models, keys = int(done["models"]), int(done["keys"])
    return f"{models} model{'s' * (models != 1)} and {keys} API key{'s' * (keys != 1)}"
