"""Whether an adapter answers as it did when the same files were first loaded. In the engine's process."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

from llmrun_runtime.engines.base import TokenLogprobs
from llmrun_runtime.engines.shim.adapter_slots import AdapterError

log = logging.getLogger("llmrun.adapters")
# Of a token's log-probability, in the mean: rounding, which differs with what else is in a batch, moves it by
# hundredths (bfloat16), another adapter by whole ones.
TOLERANCE = 0.1
UNAVAILABLE = 503


class Canary:
    """`folder`: where the first answers are kept; of one version of a model, and so of one engine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def check(self, name: str, pin: str, said: Sequence[TokenLogprobs]) -> None:
        """Compare what came with what came at the first load; keep them if there were none.

        Raises AdapterError if they differ.
        """
        try:
            first = await asyncio.to_thread(self._first, pin, said)
        except OSError as error:
            text = f"its first answers cannot be read or kept ({error}) (canary=True)"
            raise AdapterError(text, UNAVAILABLE) from None
        apart = difference(first, said)
        if apart <= TOLERANCE:
            return
        text = f"it answers otherwise than when the same files were first loaded: {apart:.3g} apart (canary=True)"
        log.error("the adapter %s (%s): %s; it is unloaded", name, pin, text)
        raise AdapterError(text, UNAVAILABLE)

    def _first(self, pin: str, said: Sequence[TokenLogprobs]) -> Sequence[TokenLogprobs]:
        file = self._folder / f"{pin}.json"
        try:
            first: list[TokenLogprobs] = json.loads(file.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, ValueError):
                log.warning("%s is damaged (%s): what comes now is the first", file, error)
            if difference(said, said):
                text = "it answers with log-probabilities that are no numbers (canary=True)"
                raise AdapterError(text, UNAVAILABLE) from None
            self._folder.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(list(said)))
            new.replace(file)
            return said
        return first


def difference(first: Sequence[TokenLogprobs], said: Sequence[TokenLogprobs]) -> float:
    """The mean distance over the tokens that were the likeliest at first; infinite if they cannot be compared."""
    values = [value for place in [*first, *said] for value in place.values()]
    if len(first) != len(said) or not all(first) or not all(said) or not all(map(math.isfinite, values)):
        return math.inf
    apart = [
        # Of one that is not among the likeliest any more that is the least distance.
        abs(value - now.get(token, min(now.values())))
        for then, now in zip(first, said, strict=True)
        for token, value in then.items()
    ]
    return sum(apart) / len(apart) if apart else 0
