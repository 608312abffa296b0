"""Lists a model's adapters at the sources of its `lora=`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmrun.errors import LLMRunError, WeightsError
from llmrun.lora import LoRA
from llmrun.spec import Secret
from llmrun.weights import Weights
from llmrun_runtime.control.catalog.weights import WeightsCatalog
from llmrun_runtime.placement import Placement
from llmrun_runtime.weights.adapters import Adapter

log = logging.getLogger("llmrun.control")


@dataclass
class ModelAdapters:
    """One listing of a model's adapters."""

    lora: LoRA
    """The `lora=` whose sources were listed."""
    adapters: dict[str, Adapter]
    """By name."""
    previous: dict[str, Adapter] = field(default_factory=dict)
    """The adapters before the last change, which requests in progress may use."""
    listed_at: float = 0
    """In seconds of the monotonic clock."""
    digest: str = ""
    """That of the listing of `lora.path`; "" if there is none, or `adapters` are not what is there."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Folders that look like adapters and are none, with the reasons."""

    def is_of(self, lora: LoRA | None) -> bool:
        """Whether `lora` has the same sources."""
        return lora is not None and self.lora.sources == lora.sources

    @property
    def ranks(self) -> dict[str, int]:
        """The adapters' ranks, by `Adapter.config_id`."""
        return {adapter.config_id: adapter.rank for adapter in self.adapters.values()}


async def list_sources(
    weights: WeightsCatalog,
    lora: LoRA,
    env: Mapping[str, Secret | str],
    placement: Placement,
    last: ModelAdapters | None,
    *,
    strict: bool = False,
) -> ModelAdapters:
    """List all adapters at the sources of `lora`. Raises LLMRunError.

    The ranks of configurations in `last` are not read again. If one of several sources cannot be listed, its adapter
    is taken from `last`; with `strict`, for a deploy, it is an error, and nodes without an agent are used too.
    """
    if lora.path:
        ranks, known = (last.ranks, last.digest if last.is_of(lora) else "") if last else ({}, "")
        listed = await weights.list_adapters(lora.path, env, placement, ranks, known, start_agents=strict)
        if listed.adapters is None and last:
            return replace(last, listed_at=time.monotonic())
        by_name = {adapter.name: adapter for adapter in listed.adapters or ()}
        return ModelAdapters(lora, by_name, listed_at=time.monotonic(), digest=listed.digest, skipped=listed.skipped)
    old = last.adapters if last else {}
    calls = [
        _list_one(weights, name, source, env, placement, old.get(name), start_agents=strict)
        for name, source in lora.adapters.items()
    ]
    adapters: dict[str, Adapter] = {}
    errors: list[LLMRunError] = []
    for name, result in zip(lora.adapters, await asyncio.gather(*calls, return_exceptions=True), strict=True):
        if isinstance(result, LLMRunError) and not strict:
            log.warning("adapter %s: %s", name, result)
            errors.append(result)
            if name in old:
                adapters[name] = old[name]
        elif isinstance(result, BaseException):
            raise result
        else:
            adapters[name] = result
    if len(errors) == len(lora.adapters):
        raise errors[0]
    return ModelAdapters(lora, adapters, listed_at=time.monotonic())


async def _list_one(
    weights: WeightsCatalog,
    name: str,
    source: Weights,
    env: Mapping[str, Secret | str],
    placement: Placement,
    last: Adapter | None,
    *,
    start_agents: bool,
) -> Adapter:
    ranks = {last.config_id: last.rank} if last else {}
    adapters = (await weights.list_adapters(source, env, placement, ranks, start_agents=start_agents)).adapters
    if not adapters:
        raise WeightsError(f"lora={name!r}: no adapter found in {source} (adapter_config.json and its weights)")
    if len(adapters) > 1:
        raise WeightsError(f"lora={name!r}: {source} contains {len(adapters)} adapters. Use the folder of one")
    return adapters[0].model_copy(update={"name": name})


def unless_empty(model: str, listing: ModelAdapters, last: ModelAdapters | None) -> ModelAdapters:
    """Return `listing`; with the adapters of `last` if a source that had some is empty now."""
    if listing.adapters or not last or not last.adapters:
        return listing
    log.warning("adapters of %s: %s is empty now; keeping the last listing", model, listing.lora.location)
    return replace(listing, adapters=last.adapters, digest="")
