"""Loads adapters into vLLM through its engine client, bypassing its adapter names.

vLLM looks up the name in a request's body in a dict of its server. That dict is replaced by one that always returns the
adapter of the request that the current task serves. A name therefore never means another adapter than the admitted one,
and llmrun alone controls loading, unloading and ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from llmrun.lora import split_revision
from llmrun_runtime.engines.base import TokenLogprobs
from llmrun_runtime.engines.shim.adapter_slots import AdapterError
from llmrun_runtime.engines.shim.peft import check_adapter, read_base
from llmrun_runtime.safetensors_files import Shapes

# Separates a number from a name that an older adapter still has; it occurs in no adapter's name.
DUPLICATE = "@"
PROBES, PROBE_TOKENS, PROBE_LOGPROBS = 8, 8, 20
_current: ContextVar[LoRARequest | None] = ContextVar("llmrun_adapter", default=None)


class _CurrentAdapter(dict[str, LoRARequest]):
    """Returns the adapter of the request that the current task serves, for every name."""

    def __contains__(self, name: object) -> bool:
        return _current.get() is not None

    def __getitem__(self, name: str) -> LoRARequest:
        adapter = _current.get()
        if adapter is None:
            raise KeyError(name)
        return adapter

    def get(self, name: str, default: Any = None) -> Any:
        """See `dict.get`."""
        return _current.get() or default


class VLLMAdapters:
    """See `Loader`. `app`: the app of vLLM's server."""

    def __init__(self, app: Any, max_lora_rank: int) -> None:
        models = app.state.openai_serving_models
        models.lora_requests = _CurrentAdapter()
        self._engine = models.engine_client
        self._model = models.base_model_paths[0].name
        self._max_lora_rank = max_lora_rank
        self._ids = itertools.count(1)
        self._names: set[str] = set()
        self._weights = Path(self._engine.model_config.model)
        self._base: Shapes | None = None

    async def load(self, name: str, folder: Path) -> LoRARequest:
        """See `Loader`."""
        await asyncio.to_thread(self._check, folder)
        # Usage and answers name the adapter without its revision.
        number, lora_name = next(self._ids), f"{self._model}:{split_revision(name)[0]}"
        # vLLM compares names in places: an adapter and its next revision must have different ones.
        lora_name += f"{DUPLICATE}{number}" if lora_name in self._names else ""
        request = LoRARequest(lora_name, number, str(folder))
        self._names.add(lora_name)
        try:
            await self._engine.add_lora(request)
        except BaseException as error:  # the engine's core can raise any exception
            self._names.discard(lora_name)
            if not isinstance(error, Exception):
                raise
            with contextlib.suppress(Exception):  # it may be partly loaded
                await self._engine.remove_lora(number)
            lines = str(error).strip().splitlines()
            raise AdapterError(f"vLLM cannot load it: {lines[-1] if lines else type(error).__name__}", 400) from None
        return request

    def _check(self, folder: Path) -> None:
        if self._base is None:
            self._base = read_base(self._weights)
        check_adapter(folder, self._base, self._max_lora_rank)

    async def unload(self, adapter: LoRARequest) -> None:
        """See `Loader`."""
        await self._engine.remove_lora(adapter.lora_int_id)
        self._names.discard(adapter.lora_name)

    async def probe(self, adapter: LoRARequest) -> list[TokenLogprobs]:
        """See `Loader`: the next token after short prompts, whose tokens are spread over the vocabulary.

        Prompt log-probabilities are not usable: with adapters in a batch, vLLM 0.32 mixes up rows.
        """
        config = self._engine.model_config
        step = max(1, config.get_vocab_size() // (PROBES * PROBE_TOKENS))
        tokens = range(0, PROBES * PROBE_TOKENS * step, step)
        top = PROBE_LOGPROBS if config.max_logprobs < 0 else min(PROBE_LOGPROBS, config.max_logprobs)
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=top)

        async def answer(prompt: TokensPrompt) -> TokenLogprobs:
            positions: list[Any] = []
            async for output in self._engine.generate(prompt, params, f"canary-{uuid.uuid4()}", lora_request=adapter):
                positions = output.outputs[0].logprobs or positions
            return {str(token): entry.logprob for token, entry in positions[0].items()} if positions else {}

        prompts = [TokensPrompt(prompt_token_ids=list(tokens[offset::PROBES])) for offset in range(PROBES)]
        try:
            return await asyncio.gather(*map(answer, prompts))
        except Exception as error:  # noqa: BLE001 - a model that generates no text, an engine that has exited
            raise AdapterError(f"its canary prompts failed ({type(error).__name__}: {error})", 503) from None

    @contextlib.contextmanager
    def using(self, adapter: LoRARequest) -> Iterator[None]:
        """See `Loader`."""
        token = _current.set(adapter)
        try:
            yield
        finally:
            _current.reset(token)
