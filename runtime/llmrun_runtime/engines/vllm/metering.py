"""Meters vLLM: notes what its `AsyncLLM` gives out, for the request that the task works on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from llmrun_runtime.engines.shim import usage_meter
from llmrun_runtime.engines.vllm.adapters import AGAIN


def meter_vllm() -> None:
    """Wrap `AsyncLLM.generate` and `AsyncLLM.encode`, once."""
    if not hasattr(AsyncLLM.generate, "__wrapped__"):
        AsyncLLM.generate = _metered(AsyncLLM.generate)
        AsyncLLM.encode = _metered(AsyncLLM.encode)


def _metered(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    async def metered(self: Any, *args: Any, **more: Any) -> AsyncGenerator[Any, None]:
        asked = signature.bind(self, *args, **more).arguments
        request, lora = usage_meter.current(), asked.get("lora_request")
        params = asked.get("sampling_params")
        adapter = lora.lora_name.partition(AGAIN)[0] if lora else ""
        # Of an answer comes either all so far, or what is new.
        whole = getattr(params, "output_kind", None) == RequestOutputKind.CUMULATIVE
        first, seen = True, 0
        # Several answers to one prompt come in turns: their time is none of a token's.
        stream = usage_meter.Stream(adapter) if request and getattr(params, "n", 1) == 1 else None
        try:
            async with aclosing(original(self, *args, **more)) as outputs:
                async for output in outputs:
                    if request:
                        parts = output.outputs if isinstance(output.outputs, list) else ()  # embeddings have none
                        tokens = sum(len(part.token_ids) for part in parts)
                        new, seen = (tokens - seen, tokens) if whole else (tokens, seen)
                        if first:
                            cached = output.num_cached_tokens or 0
                            request.note(adapter, len(output.prompt_token_ids or ()), new, cached)
                            first = False
                        elif new:
                            request.note(adapter, completion=new)
                        if stream and new:
                            stream.came(new)
                    yield output
        finally:
            if stream:
                stream.ended()

    return metered
