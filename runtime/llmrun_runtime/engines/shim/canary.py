"""Checks that an adapter answers as when the same files were first loaded. Runs in the engine's process."""

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
# For the mean difference of log-probabilities. Rounding depends on the rest of a batch and changes them by hundredths
# (bfloat16); another adapter changes them by whole numbers.
TOLERANCE = 0.1
UNAVAILABLE = 503


class Canary:
    """`folder` stores the reference answers. It belongs to one version of a model, and so to one engine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def check(self, name: str, pin: str, answers: Sequence[TokenLogprobs]) -> None:
        """Compare the answers with those of the first load; store them if this is the first load.

        Raises AdapterError if they differ.
        """
        try:
            reference = await asyncio.to_thread(self._load_or_store, pin, answers)
        except OSError as error:
            text = f"cannot read or store its reference answers ({error}) (canary=True)"
            raise AdapterError(text, UNAVAILABLE) from None
        distance = mean_distance(reference, answers)
        if distance <= TOLERANCE:
            return
        text = f"its answers differ from the first load of the same files: mean distance {distance:.3g} (canary=True)"
        log.error("adapter %s (%s): %s; unloading it", name, pin, text)
        raise AdapterError(text, UNAVAILABLE)

    def _load_or_store(self, pin: str, answers: Sequence[TokenLogprobs]) -> Sequence[TokenLogprobs]:
        file = self._folder / f"{pin}.json"
        try:
            reference: list[TokenLogprobs] = json.loads(file.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, ValueError):
                log.warning("%s is damaged (%s): storing new reference answers", file, error)
            if mean_distance(answers, answers):
                text = "it returns log-probabilities that are not numbers (canary=True)"
                raise AdapterError(text, UNAVAILABLE) from None
            self._folder.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(list(answers)))
            new.replace(file)
            return answers
        return reference


def mean_distance(reference: Sequence[TokenLogprobs], answers: Sequence[TokenLogprobs]) -> float:
    """Return the mean distance over the reference's most likely tokens; infinity if they are not comparable."""
    values = [value for position in [*reference, *answers] for value in position.values()]
    if len(reference) != len(answers) or not all(reference) or not all(answers) or not all(map(math.isfinite, values)):
        return math.inf
    distances = [
        # For a token that is no longer among the most likely ones, this is a lower bound.
        abs(value - now.get(token, min(now.values())))
        for then, now in zip(reference, answers, strict=True)
        for token, value in then.items()
    ]
    return sum(distances) / len(distances) if distances else 0
