"""Where a model's adapters lie, and how many of them an engine holds.

Knows how that is written; fetches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from llmrun.errors import SpecError
from llmrun.weights import Weights, as_weights

# In a request it stands after `model:`, and `@revision` may follow; in stores it is a folder's name.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")
# An adapter's files, PEFT's: https://huggingface.co/docs/peft/developer_guides/checkpoint
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What vLLM has kernels for: `vllm.config.lora.MaxLoRARanks`.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class LoRA(BaseModel):
    """A model's adapters, served as `model:adapter`.

    Args:
        path: a place with a folder for each adapter, or one adapter: any source that weights can come from.
        adapters: adapters by name, each with a source of its own.
        max_loaded: adapters that one replica holds at once (the engine keeps room for so many).
        max_rank: the largest rank that an adapter may have.
        refresh: seconds after which changes at the sources are seen.

    Raises:
        SpecError: something is written wrong; the message says what.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Annotated[Weights | None, BeforeValidator(as_weights)] = None
    adapters: dict[str, Annotated[Weights, BeforeValidator(as_weights)]] = {}
    max_loaded: int = 16
    max_rank: int = 64
    refresh: float = 60

    def __init__(
        self,
        path: Weights | str | None = None,
        *,
        adapters: Mapping[str, Weights | str] | None = None,
        max_loaded: int = 16,
        max_rank: int = 64,
        refresh: float = 60,
    ) -> None:
        if (path is None) == (not adapters):
            raise SpecError('lora: say where adapters lie, lora="s3://bucket/adapters", or which, lora={"legal": "…"}')
        for name in adapters or {}:
            if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
                raise SpecError(f"lora={name!r}: an adapter's name has letters, digits, '.', '_' and '-'")
        if type(max_loaded) is not int or max_loaded < 1:
            raise SpecError(f"lora: max_loaded={max_loaded!r}: a number of adapters, 1 or more")
        if max_rank not in RANKS:
            raise SpecError(f"lora: max_rank={max_rank!r}: one of {', '.join(map(str, RANKS))}")
        if not isinstance(refresh, int | float) or not 1 <= refresh < float("inf"):
            raise SpecError(f"lora: refresh={refresh!r}: seconds, 1 or more")
        super().__init__(
            path=as_weights(path),
            adapters={name: as_weights(where) for name, where in (adapters or {}).items()},
            max_loaded=max_loaded,
            max_rank=max_rank,
            refresh=float(refresh),
        )

    def __str__(self) -> str:
        fields = LoRA.model_fields
        said = {name: getattr(self, name) for name in ("max_loaded", "max_rank", "refresh")}
        options = [f"{name}={value:g}" for name, value in said.items() if value != fields[name].default]
        return f"{self.places} ({', '.join(options)})" if options else self.places

    @property
    def places(self) -> str:
        """Where its adapters lie, for a person."""
        return str(self.path) if self.path else ", ".join(f"{name}: {where}" for name, where in self.adapters.items())


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
