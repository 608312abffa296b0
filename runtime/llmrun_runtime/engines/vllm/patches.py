"""What vLLM does wrong where we need it right. vLLM loads `apply` as a plugin in each of its processes.

On CPU its LoRA kernels index the stacked adapters with -1 for rows of the base model, which in Python is the last slot:
in a batch of both, the base model's answers are an adapter's (vLLM 0.32, `vllm.lora.ops.torch_ops.lora_ops`).
And a request for log-probabilities of its prompt (`prompt_logprobs`, `echo`) ends the engine: its logits have more rows
than the batch has requests. Those rows get nothing of an adapter; only one that changes `lm_head` would give some.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from llmrun_runtime.engines.base import SHIM_ENV, ShimConfig

KERNELS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def apply() -> None:
    """Mend this process's vLLM, if llmrun started it with adapters and it is wrong."""
    if SHIM_ENV in os.environ and ShimConfig.from_json(os.environ[SHIM_ENV]).max_loaded:
        mend_cpu_kernels()


def mend_cpu_kernels() -> None:
    """Rows without an adapter, or whose adapter is not said, get nothing from any, whichever kernel.

    Does nothing where that is so already.
    """
    from vllm.lora.ops.torch_ops import lora_ops  # noqa: PLC0415 - vLLM is there in engines only
    from vllm.lora.punica_wrapper import punica_cpu  # noqa: PLC0415

    if not base_rows_are_changed(lora_ops):
        return
    for name in KERNELS:
        mended = _without_base_rows(getattr(lora_ops, name))
        for module in (lora_ops, punica_cpu):
            setattr(module, name, mended)


def base_rows_are_changed(kernels: Any) -> bool:
    """Whether a row of index -1 gets something of an adapter's."""
    import torch  # noqa: PLC0415

    rows, stacked, out = torch.ones(1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1)
    kernels.bgmv_expand(rows, stacked, out, torch.tensor([-1]))
    return bool(out.any())


def _without_base_rows(kernel: Any) -> Any:
    @functools.wraps(kernel)
    def mended(inputs: Any, weights: Any, out: Any, indices: Any, *args: Any, **more: Any) -> None:
        if len(indices) not in (1, len(inputs)):
            return
        without = indices < 0
        if without.any():
            inputs = inputs.masked_fill(without.unsqueeze(-1), 0)
        kernel(inputs, weights, out, indices, *args, **more)

    return mended
