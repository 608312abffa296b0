"""Whether an adapter answers as it did when the same files were first loaded. In the engine's process."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

from llmrun_runtime.engines.adapters import AdapterError

log = logging.getLogger("llmrun.adapters")
# Of a token's log-probability, in the mean over the prompt: rounding, which differs with what else is in a batch, moves
# it by hundredths (bfloat16), another adapter by whole ones.
TOLERANCE = 0.1
UNAVAILABLE = 503


class Canary:
    """`folder`: where the first answers are kept; of one version of a model, and so of one engine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def check(self, name: str, pin: str, said: Sequence[float]) -> None:
        """Compare the log-probabilities with those of the first load; keep them if there were none.

        Raises AdapterError if they differ.
        """
        first = await asyncio.to_thread(self._first, pin, said)
        apart = difference(first, said)
        if apart <= TOLERANCE:
            return
        text = f"it answers otherwise than when the same files were first loaded: {apart:.3g} apart (canary=True)"
        log.error("the adapter %s (%s): %s; it is unloaded", name, pin, text)
        raise AdapterError(text, UNAVAILABLE)

    def _first(self, pin: str, said: Sequence[float]) -> Sequence[float]:
        file = self._folder / f"{pin}.json"
        try:
            first: list[float] = json.loads(file.read_bytes())
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(list(said)))
            new.replace(file)
            return said
        return first


def difference(first: Sequence[float], said: Sequence[float]) -> float:
    """The mean distance of two lists; infinite if they cannot be compared."""
    if len(first) != len(said) or not all(map(math.isfinite, [*first, *said])):
        return math.inf
    return sum(abs(one - other) for one, other in zip(first, said, strict=True)) / max(1, len(said))
