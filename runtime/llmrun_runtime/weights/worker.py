"""`python -m llmrun_runtime.weights.worker`: run weights tasks in a separate process.

Each model's credentials are then plain environment variables, a crash or `kill -9` harms nothing else, and the memory
that the stores' packages use is freed.

Reads one Task as JSON per line from standard input. Writes JSON lines to standard output: during the task
`{"complete": …, "total": …}` (bytes), then one with `result` or `error` (`not_found`: it is a NotFound), then
`{"idle": true}` when it can run the next task. Exits when standard input closes, even during a task: it ends with the
node agent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrun.errors import LLMRunError, NotFound
from llmrun.settings import Settings
from llmrun_runtime.niceness import run_in_background
from llmrun_runtime.weights.adapter_listing import list_adapters
from llmrun_runtime.weights.cache.cache import Cache, Manifest, open_cache
from llmrun_runtime.weights.fetch import Fetcher, Progress
from llmrun_runtime.weights.import_folder import import_folder
from llmrun_runtime.weights.stores.base import open_store
from llmrun_runtime.weights.tasks import (
    FetchTask,
    ImportTask,
    ListAdaptersTask,
    MirrorTask,
    PinTask,
    PushAdapterTask,
    Task,
    VerifyTask,
    task_adapter,
)

REPORT_INTERVAL_S = 0.25


@dataclass
class Outcome:
    """A task's result, and work to do after it was sent."""

    result: Any
    finish: Callable[[], None] = lambda: None


def run(task: Task, cache: Cache, progress: Progress) -> Outcome:
    """Run a task. Raises LLMRunError or OSError."""
    match task:
        case PinTask():
            return _pin(task)
        case ListAdaptersTask():
            return _list_adapters(task)
        case FetchTask():
            return _fetch(task, cache, progress)
        case ImportTask():
            return _import(task, cache, progress)
        case VerifyTask():
            return _verify(task, cache)
        case MirrorTask():
            return _mirror(task, cache, progress)
        case PushAdapterTask():
            return _push_adapter(task)


def _pin(task: PinTask) -> Outcome:
    return Outcome(open_store(task.weights).pin().model_dump(mode="json"))


def _list_adapters(task: ListAdaptersTask) -> Outcome:
    store = open_store(task.weights)
    if task.published:
        store.check_published()
    adapters, skipped = list_adapters(store, task.known_ranks)
    listed = [adapter.model_dump(mode="json") for adapter in adapters]
    digest = hashlib.sha256(json.dumps([listed, skipped]).encode()).hexdigest()
    if digest == task.known:
        return Outcome({"digest": digest})
    return Outcome({"digest": digest, "adapters": listed, "skipped": skipped})


def _fetch(task: FetchTask, cache: Cache, progress: Progress) -> Outcome:
    manifest = Fetcher(cache, task.pin, task.keep, task.peers, progress).run()
    return Outcome(str(cache.folder(task.pin.id)), lambda: _sync(cache, manifest))


def _import(task: ImportTask, cache: Cache, progress: Progress) -> Outcome:
    manifest = import_folder(cache, Path(task.folder), task.weights, task.keep, progress)
    return Outcome(manifest.pin.model_dump(mode="json"), lambda: _sync(cache, manifest))


def _sync(cache: Cache, manifest: Manifest) -> None:
    # If it fails (the pin was evicted, the disk fails), the files are hashed again after a reboot.
    with contextlib.suppress(OSError):
        cache.sync_to_disk(manifest)


def _verify(task: VerifyTask, cache: Cache) -> Outcome:
    manifest = cache.load(task.pin.id)
    return Outcome(cache.verify(manifest) if manifest else [])


def _mirror(task: MirrorTask, cache: Cache, progress: Progress) -> Outcome:
    from llmrun_runtime.weights.mirror import mirror  # noqa: PLC0415 - few tasks write to stores

    return Outcome(mirror(cache, task.pin, task.target, progress))


def _push_adapter(task: PushAdapterTask) -> Outcome:
    from llmrun_runtime.weights.mirror import push_adapter  # noqa: PLC0415 - few tasks write to stores

    push_adapter(Path(task.folder), task.target)
    return Outcome(None)


class _ProgressReports:
    """Sends progress to the node agent, at most four times per second."""

    def __init__(self) -> None:
        self._sent_at = 0.0

    def __call__(self, complete: int, total: int) -> None:
        now = time.monotonic()
        if now - self._sent_at >= REPORT_INTERVAL_S:
            self._sent_at = now
            send({"complete": complete, "total": total})


def send(message: dict[str, Any]) -> None:
    """Send one message to the node agent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the tasks from standard input until it closes."""
    run_in_background()
    threading.Thread(target=_exit_with_agent, daemon=True).start()
    while line := sys.stdin.readline():
        try:
            outcome = run(task_adapter.validate_json(line), open_cache(Settings()), _ProgressReports())
        except LLMRunError as error:
            send({"error": str(error), "not_found": isinstance(error, NotFound)})
        except OSError as error:
            send({"error": f"{type(error).__name__}: {error}"})
        else:
            send({"result": outcome.result})
            outcome.finish()
        send({"idle": True})
    os._exit(0)  # do not wait for the threads and event loops of the stores' packages


def _exit_with_agent() -> None:
    """Exit when the other end of standard input closes, even while no task reads it."""
    poll = select.poll()
    poll.register(sys.stdin, select.POLLHUP | select.POLLRDHUP)
    while not any(event & (select.POLLHUP | select.POLLRDHUP) for _, event in poll.poll()):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
