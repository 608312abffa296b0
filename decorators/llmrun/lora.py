"""Where a model's adapters are stored, and how many of them an engine holds.

Parses and validates only; it fetches nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from llmrun.errors import SpecError
from llmrun.markers import Marker
from llmrun.weights import Weights, as_weights

# Clients send `model:adapter` or `model:adapter@revision`; in stores the name is a folder.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")
# Names of branches, tags and commits. No spaces, because a revision is sent in a header. Nothing under `refs/`: the Hub
# keeps proposed changes there, which anybody can create.
REVISION = re.compile(r"(?!refs/)(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
# PEFT's files: https://huggingface.co/docs/peft/developer_guides/checkpoint
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Real configurations have a few hundred bytes.
MAX_CONFIG_BYTES = 2**20
# The ranks that vLLM has kernels for: `vllm.config.lora.MaxLoRARanks`.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# An engine's rank if no adapter's rank is known, and its smallest one: slots of a small rank cost little.
DEFAULT_LORA_RANK, MIN_LORA_RANK = 64, 16


class LoRA(BaseModel):
    """A model's LoRA adapters, served as `model:adapter`. Either `path` or `adapters` is required.

    Args:
        path: A place with one folder per adapter, or a single adapter; any source that weights can come from.
        adapters: The source of each adapter, by name.
        max_loaded: The largest number of adapters that one replica holds at once; the engine reserves memory for them.
        max_rank: The largest rank of an adapter: 1, 8, 16, 32, 64, 128, 256, 320 or 512. By default the largest rank
            among the adapters that exist at the deploy.
        refresh: Seconds between checks of the sources for new, changed and removed adapters.
        canary: Whether to run a fixed prompt after each load and compare its log-probabilities with those of the first
            load of the same files. An adapter whose results differ is not used.

    Raises:
        SpecError: an argument is invalid. The message contains its name, its value and the fix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Annotated[Weights | None, BeforeValidator(as_weights), Marker.NO_RESTART] = None
    adapters: Annotated[dict[str, Annotated[Weights, BeforeValidator(as_weights)]], Marker.NO_RESTART] = {}
    max_loaded: int = 16
    max_rank: int | None = None
    refresh: Annotated[float, Marker.NO_RESTART] = 60
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
            raise SpecError(
                'lora: exactly one place or a mapping of adapters is required: lora="s3://bucket/adapters" '
                'or lora={"legal": "…"}'
            )
        for name in adapters or {}:
            if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
                raise SpecError(f"lora={name!r}: an adapter's name may contain only letters, digits, '.', '_' and '-'")
        if type(max_loaded) is not int or max_loaded < 1:
            raise SpecError(f"lora: max_loaded={max_loaded!r}: must be a number of adapters, 1 or more")
        if max_rank is not None and max_rank not in LORA_RANKS:
            raise SpecError(f"lora: max_rank={max_rank!r}: must be one of {', '.join(map(str, LORA_RANKS))}")
        if not isinstance(canary, bool):
            raise SpecError(f"lora: canary={canary!r}: must be True or False")
        if not isinstance(refresh, int | float) or not 1 <= refresh < float("inf"):
            raise SpecError(f"lora: refresh={refresh!r}: must be seconds, 1 or more")
        super().__init__(
            path=as_weights(path),
            adapters={name: as_weights(source) for name, source in (adapters or {}).items()},
            max_loaded=max_loaded,
            max_rank=max_rank,
            refresh=float(refresh),
            canary=canary,
        )

    def __str__(self) -> str:
        options = [
            f"{name}={_show(value)}"
            for name in ("max_loaded", "max_rank", "refresh", "canary")
            if (value := getattr(self, name)) != LoRA.model_fields[name].default
        ]
        return f"{self.location} ({', '.join(options)})" if options else self.location

    @property
    def location(self) -> str:
        """Where the adapters are stored, for messages."""
        return str(self.path) if self.path else ", ".join(f"{name}: {source}" for name, source in self.adapters.items())

    @property
    def sources(self) -> tuple[Weights | None, dict[str, Weights]]:
        """The part that determines which adapters exist; the rest determines how they are served."""
        return self.path, self.adapters

    def with_max_rank(self, ranks: Iterable[int], previous: LoRA | None) -> LoRA:
        """Return a copy with a `max_rank` that is sufficient for `ranks` (0: unknown), if possible that of `previous`.

        Keeping the previous rank avoids a restart of the engines. An explicit `max_rank` stays.
        """
        if self.max_rank:
            return self
        largest = max(ranks, default=0)
        if previous and previous.max_rank and previous.max_rank >= largest:
            return self.model_copy(update={"max_rank": previous.max_rank})
        required = max(largest, MIN_LORA_RANK) if largest else DEFAULT_LORA_RANK
        max_rank = next((rank for rank in LORA_RANKS if rank >= required), LORA_RANKS[-1])
        return self.model_copy(update={"max_rank": max_rank})


def split_revision(adapter: str) -> tuple[str, str]:
    """Split `adapter@revision` into name and revision, "" if there is none."""
    name, _, revision = adapter.partition("@")
    return name, revision


def read_lora_rank(config: str | bytes) -> int:
    """Return the largest rank in an adapter's configuration. Raises ValueError if it contains none."""
    try:
        options = json.loads(config)
        rank = max(int(options["r"]), *(int(rank) for rank in (options.get("rank_pattern") or {}).values()), 0)
    except (LookupError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if rank < 1:
        raise ValueError(f"invalid rank {rank}")
    return rank


def _show(value: float) -> str:
    return str(value) if isinstance(value, bool) else f"{value:g}"


def as_lora(value: Any) -> Any:
    """Turn a value of `lora=` (a source, sources by name, or a LoRA) into a LoRA, for pydantic. Raises SpecError."""
    if isinstance(value, str | Weights):
        return LoRA(value)
    if isinstance(value, dict):
        if value.keys() & {"path", "adapters"} and value.keys() <= set(LoRA.model_fields):
            return LoRA(**value)
        return LoRA(adapters=value)
    if value is not None and not isinstance(value, LoRA):
        raise SpecError(
            f'lora={value!r}: must be a place, lora="s3://bucket/adapters", a mapping of adapters, or LoRA(…)'
        )
    return value
