"""How vLLM takes adapters: through its engine client, past its own names.

vLLM finds an adapter by the name in a request's body, in a dict of its server's. That dict is replaced by one that
knows the adapter of the request that the task works on: so a name never means another adapter than the one that was
admitted, and loading, unloading and ids are ours alone.
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
from llmrun_runtime.engines.shim.peft import Shapes, check_adapter, read_base

# Before the number of an adapter that has its name while an older one has it, too; in no adapter's name.
AGAIN = "@"
PROBES, PROBE_TOKENS, PROBE_LIKELY = 8, 8, 20
_current: ContextVar[LoRARequest | None] = ContextVar("llmrun_adapter", default=None)


class _Current(dict[str, LoRARequest]):
    """Whatever the name: the adapter of the request that this task works on."""

    def __contains__(self, name: object) -> bool:
        return _current.get() is not None

    def __getitem__(self, name: str) -> LoRARequest:
        found = _current.get()
        if found is None:
            raise KeyError(name)
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`."""
        return _current.get() or default


class VLLMAdapters:
    """See `Loader`. `app` is the server's."""

    def __init__(self, app: Any, max_rank: int) -> None:
        models = app.state.openai_serving_models
        models.lora_requests = _Current()
        self._engine = models.engine_client
        self._model = models.base_model_paths[0].name
        self._max_rank = max_rank
        self._ids = itertools.count(1)
        self._names: set[str] = set()
        self._weights = Path(self._engine.model_config.model)
        self._base: Shapes | None = None

    async def load(self, name: str, folder: Path) -> LoRARequest:
        """See `Loader`."""
        await asyncio.to_thread(self._check, folder)
        # Usage and answers speak of the adapter, whatever its revision.
        number, called = next(self._ids), f"{self._model}:{split_revision(name)[0]}"
        # vLLM compares by name in places: two of one name, before and after a change, must not be taken for one.
        called += f"{AGAIN}{number}" if called in self._names else ""
        request = LoRARequest(called, number, str(folder))
        self._names.add(called)
        try:
            await self._engine.add_lora(request)
        except BaseException as error:  # whatever the engine's core raised comes as one of many
            self._names.discard(called)
            if not isinstance(error, Exception):
                raise
            with contextlib.suppress(Exception):  # what there is of it
                await self._engine.remove_lora(number)
            lines = str(error).strip().splitlines()
            raise AdapterError(f"vLLM cannot load it: {lines[-1] if lines else type(error).__name__}", 400) from None
        return request

    def _check(self, folder: Path) -> None:
        if self._base is None:
            self._base = read_base(self._weights)
        check_adapter(folder, self._base, self._max_rank)

    async def unload(self, adapter: LoRARequest) -> None:
        """See `Loader`."""
        await self._engine.remove_lora(adapter.lora_int_id)
        self._names.discard(adapter.lora_name)

    async def probe(self, adapter: LoRARequest) -> list[TokenLogprobs]:
        """See `Loader`: short prompts of tokens from all over the vocabulary, a token after each.

        Not by log-probabilities of prompts: with adapters in a batch vLLM 0.32 takes one row's for another's.
        """
        config = self._engine.model_config
        step = max(1, config.get_vocab_size() // (PROBES * PROBE_TOKENS))
        tokens = range(0, PROBES * PROBE_TOKENS * step, step)
        most = PROBE_LIKELY if config.max_logprobs < 0 else min(PROBE_LIKELY, config.max_logprobs)
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=most)

        async def ask(prompt: TokensPrompt) -> TokenLogprobs:
            places: list[Any] = []
            async for output in self._engine.generate(prompt, params, f"canary-{uuid.uuid4()}", lora_request=adapter):
                places = output.outputs[0].logprobs or places
            return {str(token): found.logprob for token, found in places[0].items()} if places else {}

        prompts = [TokensPrompt(prompt_token_ids=list(tokens[at::PROBES])) for at in range(PROBES)]
        try:
            return await asyncio.gather(*map(ask, prompts))
        except Exception as error:  # noqa: BLE001 - a model that makes no text, an engine that has died
            raise AdapterError(f"its canary could not be asked ({type(error).__name__}: {error})", 503) from None

    @contextlib.contextmanager
    def using(self, adapter: LoRARequest) -> Iterator[None]:
        """See `Loader`."""
        token = _current.set(adapter)
        try:
            yield
        finally:
            _current.reset(token)
