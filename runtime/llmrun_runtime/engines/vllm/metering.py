"""Meters vLLM: records what its `AsyncLLM` generates for the request that the current task serves."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient

from llmrun_runtime.engines.shim import usage_meter
from llmrun_runtime.engines.vllm.adapters import DUPLICATE


def meter_vllm() -> None:
    """Wrap `AsyncLLM.generate` and `AsyncLLM.encode`, and the receiver of the core's outputs, once."""
    if not hasattr(AsyncLLM.generate, "__wrapped__"):
        AsyncLLM.generate = _metered(AsyncLLM.generate)
        AsyncLLM.encode = _metered(AsyncLLM.encode)
        AsyncMPClient.get_output_async = _marked(AsyncMPClient.get_output_async)


def _marked(original: Any) -> Any:
    @functools.wraps(original)
    async def marked(self: Any) -> Any:
        """Receive the result of one step of the core, which also arrives if the step only extends long prompts."""
        outputs = await original(self)
        usage_meter.mark_output()
        return outputs

    return marked


def _metered(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    async def metered(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        arguments = signature.bind(self, *args, **kwargs).arguments
        request, lora = usage_meter.current(), arguments.get("lora_request")
        params = arguments.get("sampling_params")
        adapter = lora.lora_name.partition(DUPLICATE)[0] if lora else ""
        # Each output contains either all tokens so far, or the new ones.
        cumulative = getattr(params, "output_kind", None) == RequestOutputKind.CUMULATIVE
        first, seen = True, 0
        if request:
            request.reached_engine = True
        # Several completions of a prompt interleave, so the time between outputs is not per token.
        stream = usage_meter.Stream(adapter) if request and getattr(params, "n", 1) == 1 else None
        try:
            async with aclosing(original(self, *args, **kwargs)) as outputs:
                async for output in outputs:
                    if request:
                        parts = output.outputs if isinstance(output.outputs, list) else ()  # embeddings have no tokens
                        tokens = sum(len(part.token_ids) for part in parts)
                        new, seen = (tokens - seen, tokens) if cumulative else (tokens, seen)
                        if first:
                            cached = output.num_cached_tokens or 0
                            request.record(adapter, len(output.prompt_token_ids or ()), new, cached)
                            first = False
                        elif new:
                            request.record(adapter, completion=new)
                        if stream and new:
                            stream.add(new)
                    yield output
        finally:
            if stream:
                stream.finish()

    return metered
