"""Checks that control's database is the one that the running applications were deployed from.

Control deletes applications that its database does not know. With a lost, an old or another database, it would delete
all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llmrun.errors import ClusterError
from llmrun_runtime import ray_internals
from llmrun_runtime.control.state.database import Database

CLUSTER_ID = "cluster_id"
NOTHING_DELETED = "The running models stay as they are"
OR_STOP = "or stop the models with `llmrun down`, then run `llmrun up`"


async def check_database(database: Database, running: Sequence[tuple[str, int]]) -> None:
    """Record the database's id in the Ray cluster. `running`: the models and versions of the applications.

    Raises ClusterError if they were deployed from another database, or from a later state of this one.
    """
    stored = await database.run(database.cluster_id)
    recorded = await asyncio.to_thread(ray_internals.read_cluster_value, CLUSTER_ID)
    last = {model: await database.run(database.last_version, model) for model in {model for model, _ in running}}
    if cause := find_mismatch(database.url, stored, recorded, running, last):
        raise ClusterError(cause)
    if recorded != stored:
        await asyncio.to_thread(ray_internals.write_cluster_value, CLUSTER_ID, stored)


def find_mismatch(
    url: str, stored: str, recorded: str | None, running: Sequence[tuple[str, int]], last: dict[str, int]
) -> str:
    """Say why the database is not that of the running applications; "" if it is.

    `recorded` is the id of the Ray cluster's database; `last` has each running model's last version number.
    """
    if not running:  # a new cluster, or one that another database left
        return ""
    if recorded not in (None, stored):
        return (
            f"{url} is not the database of the running models. {NOTHING_DELETED}. "
            f"Set LLMRUN_DATABASE_URL to theirs (id {recorded}), {OR_STOP}"
        )
    unknown = [f"{model} v{version}" for model, version in sorted(running) if version > last[model]]
    if unknown:
        return (
            f"{url} is older than the running models: it does not know {', '.join(unknown)}. {NOTHING_DELETED}. "
            f"Restore the current database, {OR_STOP}"
        )
    return ""
