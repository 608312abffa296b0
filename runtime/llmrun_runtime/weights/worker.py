"""`python -m llmrun_runtime.weights.worker`: errands for weights, in a process of its own.

So credentials are plain environment variables, each model has its own, a crash or `kill -9` takes nothing along, and
what the stores' packages need of memory goes back. Reads Errands from standard input, a line of JSON each; writes
`{"here": …, "total": …}` lines while it works, one with `result` or `error` (`missing`: it is a NotThere), and
`{"free": true}` when it can take the next. Ends when standard input closes, in the middle of
an errand too: with the node agent.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from llmrun.errors import LLMRunError, NotFound, WeightsError
from llmrun.settings import Settings
from llmrun.weights import AnyWeights
from llmrun_runtime.weights.adapter_listing import list_adapters
from llmrun_runtime.weights.cache.cache import open_cache
from llmrun_runtime.weights.fetch import Fetcher, Peer
from llmrun_runtime.weights.import_folder import take_folder
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.weights.stores.base import open_store

REPORT_S = 0.25


class WorkerTask(BaseModel):
    """What to do."""

    do: Literal["pin", "adapters", "bring", "import", "verify", "mirror", "push"]
    weights: AnyWeights | None = None
    pin: Pin | None = None
    peers: tuple[Peer, ...] = ()
    keep: tuple[str, ...] = ()
    folder: str = ""
    """For `import` and `push`: where the files lie."""
    target: AnyWeights | None = None
    """For `mirror` and `push`: where they go."""
    ranks: dict[str, int] | None = {}
    """For `adapters`: those known already, by pin; None: they are not wanted."""


class Progress:
    """Says how far it is, four times a second at most."""

    def __init__(self) -> None:
        self._said = 0.0

    def __call__(self, here: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said >= REPORT_S:
            self._said = now
            say({"here": here, "total": total})


def say(message: dict[str, Any]) -> None:
    """One line for the node agent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def run(errand: WorkerTask) -> object:
    """Do it; the result. Raises WeightsError."""
    cache, progress = open_cache(Settings()), Progress()
    if errand.do == "pin" and errand.weights:
        return open_store(errand.weights).pin().model_dump(mode="json")
    if errand.do == "adapters" and errand.weights:
        adapters = list_adapters(open_store(errand.weights), errand.ranks)
        return [adapter.model_dump(mode="json") for adapter in adapters]
    if errand.do == "bring" and errand.pin:
        manifest = Fetcher(cache, errand.pin, errand.keep, errand.peers, progress).run()
        say({"result": str(cache.folder(errand.pin.id))})
        cache.settle(manifest)
        return None
    if errand.do == "import" and errand.weights:
        manifest = take_folder(cache, Path(errand.folder), errand.weights, errand.keep, progress)
        say({"result": manifest.pin.model_dump(mode="json")})
        cache.settle(manifest)
        return None
    if errand.do == "verify" and errand.pin:
        found = cache.load(errand.pin.id)
        return cache.verify(found) if found else []
    if errand.do == "mirror" and errand.pin and errand.target:
        from llmrun_runtime.weights.mirror import mirror  # noqa: PLC0415 - few errands write to stores

        return mirror(cache, errand.pin, errand.target, progress)
    if errand.do == "push" and errand.target:
        from llmrun_runtime.weights.mirror import push  # noqa: PLC0415

        push(Path(errand.folder), errand.target)
        return True
    raise WeightsError(f"the weights worker cannot {errand.do} that: is this llmrun as old as the cluster's?")


def main() -> None:
    """Do what standard input says, until it closes."""
    threading.Thread(target=_end_with_the_agent, daemon=True).start()
    while line := sys.stdin.readline():
        try:
            result = run(WorkerTask.model_validate_json(line))
        except LLMRunError as error:
            say({"error": str(error), "missing": isinstance(error, NotFound)})
        except OSError as error:
            say({"error": f"{type(error).__name__}: {error}"})
        else:
            if result is not None:
                say({"result": result})
        say({"free": True})
    os._exit(0)  # the stores' packages leave threads and loops that need no farewell


def _end_with_the_agent() -> None:
    """Exit when the other end of standard input is gone, though nobody reads it."""
    poll = select.poll()
    poll.register(sys.stdin, select.POLLHUP | select.POLLRDHUP)
    while not any(what & (select.POLLHUP | select.POLLRDHUP) for _, what in poll.poll()):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
