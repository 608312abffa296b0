"""Patches of vLLM for llmrun. vLLM calls `apply` as a plugin in each of its processes.

The cores of an engine on CPU are bound in `cpu_cores`. The rest of this module is for a bug.

On CPU, vLLM's LoRA kernels index the stacked adapters with -1 for rows of the base model. In Python that is the last
slot, so in a mixed batch the base model's answers come from an adapter (vLLM 0.32, `vllm.lora.ops.torch_ops.lora_ops`).
Requests for prompt log-probabilities (`prompt_logprobs`, `echo`) crash the engine: their logits have more rows than the
batch has requests. With the patch these rows get no adapter; only an adapter that changes `lm_head` would change them.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from llmrun_runtime.engines.base import SHIM_ENV, ShimConfig
from llmrun_runtime.engines.vllm.cpu_cores import bind_worker

KERNELS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def apply() -> None:
    """Patch vLLM in this process, if llmrun started it with cores or with adapters."""
    bind_worker()
    if SHIM_ENV in os.environ and ShimConfig.from_json(os.environ[SHIM_ENV]).max_loaded:
        patch_cpu_kernels()


def patch_cpu_kernels() -> None:
    """Keep rows without an adapter, or with an unspecified one, unchanged by every kernel.

    No effect if vLLM's kernels already do so.
    """
    from vllm.lora.ops.torch_ops import lora_ops  # noqa: PLC0415 - only engines have vLLM
    from vllm.lora.punica_wrapper import punica_cpu  # noqa: PLC0415

    if not changes_base_rows(lora_ops):
        return
    for name in KERNELS:
        patched = _without_base_rows(getattr(lora_ops, name))
        for module in (lora_ops, punica_cpu):
            setattr(module, name, patched)


def changes_base_rows(kernels: Any) -> bool:
    """Return whether the kernels apply an adapter to a row with index -1."""
    import torch  # noqa: PLC0415

    rows, stacked, out = torch.ones(1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1)
    kernels.bgmv_expand(rows, stacked, out, torch.tensor([-1]))
    return bool(out.any())


def _without_base_rows(kernel: Any) -> Any:
    @functools.wraps(kernel)
    def patched(inputs: Any, weights: Any, out: Any, indices: Any, *args: Any, **kwargs: Any) -> None:
        if len(indices) not in (1, len(inputs)):
            return
        base_rows = indices < 0
        if base_rows.any():
            inputs = inputs.masked_fill(base_rows.unsqueeze(-1), 0)
        kernel(inputs, weights, out, indices, *args, **kwargs)

    return patched
