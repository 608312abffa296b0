"""Where a model's adapters lie, and how many of them an engine holds.

Knows how that is written; fetches nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from llmrun.errors import SpecError
from llmrun.weights import Weights, as_weights

# In a request it stands after `model:`, and `@revision` may follow; in stores it is a folder's name.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")
# As people name branches, tags and commits; no spaces, for it stands in a header. The Hub keeps what was only proposed
# under `refs/`: anybody may put that there.
REVISION = re.compile(r"(?!refs/)(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
# An adapter's files, PEFT's: https://huggingface.co/docs/peft/developer_guides/checkpoint
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Real ones have a few hundred bytes.
MAX_CONFIG_BYTES = 2**20
# What vLLM has kernels for: `vllm.config.lora.MaxLoRARanks`.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What an engine is made for where no rank is known, and at least: slots of a small rank cost little.
USUAL_RANK, LEAST_RANK = 64, 16


class LoRA(BaseModel):
    """A model's adapters, served as `model:adapter`.

    Args:
        path: a place with a folder for each adapter, or one adapter: any source that weights can come from.
        adapters: adapters by name, each with a source of its own.
        max_loaded: adapters that one replica holds at once (the engine keeps room for so many).
        max_rank: the largest rank that an adapter may have; None: that of those that are there at the deploy.
        refresh: seconds after which changes at the sources are seen.
        canary: after each load a fixed prompt is run, and its log-probabilities are compared with those of the first
            load of the same files: an adapter that answers otherwise is not used.

    Raises:
        SpecError: something is written wrong; the message says what.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Annotated[Weights | None, BeforeValidator(as_weights)] = None
    adapters: dict[str, Annotated[Weights, BeforeValidator(as_weights)]] = {}
    max_loaded: int = 16
    max_rank: int | None = None
    refresh: float = 60
    canary: bool = False

    def __init__(
        self,
        path: Weights | str | None = None,
        *,
        adapters: Mapping[str, Weights | str] | None = None,
        max_loaded: int = 16,
        max_rank: int | None = None,
        refresh: float = 60,
        canary: bool = False,
    ) -> None:
        if (path is None) == (not adapters):
            raise SpecError('lora: say where adapters lie, lora="s3://bucket/adapters", or which, lora={"legal": "…"}')
        for name in adapters or {}:
            if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
                raise SpecError(f"lora={name!r}: an adapter's name has letters, digits, '.', '_' and '-'")
        if type(max_loaded) is not int or max_loaded < 1:
            raise SpecError(f"lora: max_loaded={max_loaded!r}: a number of adapters, 1 or more")
        if max_rank is not None and max_rank not in RANKS:
            raise SpecError(f"lora: max_rank={max_rank!r}: one of {', '.join(map(str, RANKS))}")
        if not isinstance(canary, bool):
            raise SpecError(f"lora: canary={canary!r}: True or False")
        if not isinstance(refresh, int | float) or not 1 <= refresh < float("inf"):
            raise SpecError(f"lora: refresh={refresh!r}: seconds, 1 or more")
        super().__init__(
            path=as_weights(path),
            adapters={name: as_weights(where) for name, where in (adapters or {}).items()},
            max_loaded=max_loaded,
            max_rank=max_rank,
            refresh=float(refresh),
            canary=canary,
        )

    def __str__(self) -> str:
        fields = LoRA.model_fields
        said = {name: getattr(self, name) for name in ("max_loaded", "max_rank", "refresh", "canary")}
        options = [f"{name}={_show(value)}" for name, value in said.items() if value != fields[name].default]
        return f"{self.places} ({', '.join(options)})" if options else self.places

    @property
    def places(self) -> str:
        """Where its adapters lie, for a person."""
        return str(self.path) if self.path else ", ".join(f"{name}: {where}" for name, where in self.adapters.items())

    @property
    def sources(self) -> tuple[Weights | None, dict[str, Weights]]:
        """What says which adapters there are; the rest says how they are served."""
        return self.path, self.adapters

    def settled(self, ranks: Iterable[int], before: LoRA | None) -> LoRA:
        """With a `max_rank`: that of `before` while it suffices for `ranks` (0: not known), else one that does."""
        if self.max_rank:
            return self
        known = max(ranks, default=0)
        if before and before.max_rank and before.max_rank >= known:
            return self.model_copy(update={"max_rank": before.max_rank})
        wanted = max(known, LEAST_RANK) if known else USUAL_RANK
        return self.model_copy(update={"max_rank": next((rank for rank in RANKS if rank >= wanted), RANKS[-1])})


def split_revision(called: str) -> tuple[str, str]:
    """`adapter@revision`: its name and the revision; "" of one that is asked for as it is now."""
    name, _, revision = called.partition("@")
    return name, revision


def read_rank(config: str | bytes) -> int:
    """The largest rank that an adapter's configuration says. Raises ValueError if it says none."""
    try:
        said = json.loads(config)
        rank = max(int(said["r"]), *(int(rank) for rank in (said.get("rank_pattern") or {}).values()), 0)
    except (LookupError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if rank < 1:
        raise ValueError(f"its rank is {rank}")
    return rank


def _show(value: float) -> str:
    return str(value) if isinstance(value, bool) else f"{value:g}"


def as_lora(value: Any) -> Any:
    """What `lora=` may be: a source, sources by name, or a LoRA. For pydantic."""
    if isinstance(value, str | Weights):
        return LoRA(value)
    if isinstance(value, dict):
        if value.keys() & {"path", "adapters"} and value.keys() <= set(LoRA.model_fields):
            return LoRA(**value)
        return LoRA(adapters=value)
    if value is not None and not isinstance(value, LoRA):
        raise SpecError(f'lora={value!r}: write a place, lora="s3://bucket/adapters", names with places, or LoRA(…)')
    return value
