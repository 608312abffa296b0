"""Memory sizes of models and accelerators, for the suggestions of `llmrun init`.

Model figures are from their `config.json` and the files in their repositories; accelerator figures are the vendors'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from llmrun.errors import WeightsError

GB = 10**9
# Names as in `ray.util.accelerators`.
MEMORY_GB = {
    "T4": 16,
    "L4": 24,
    "A10G": 24,
    "L40S": 48,
    "A100-40G": 40,
    "A100-80G": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
# vLLM's default share of a GPU's memory, and what it needs in addition to weights and KV cache.
USABLE, OVERHEAD = 0.9, 2 * GB
# Models with smaller weights are fast enough on CPUs.
SMALL = 2 * GB
# Capacity of the KV cache: tokens of all concurrent requests.
KV_CACHE_TOKENS = 32_768
MAX_GPUS = 8
TIMEOUT_S = 20


@dataclass(frozen=True)
class Size:
    """A model's size: bytes of weights, bytes of KV cache per token, and attention heads (0: unknown)."""

    weights: int
    kv_per_token: int = 0
    heads: int = 0

    @property
    def required(self) -> int:
        """The memory required in bytes, with a KV cache of KV_CACHE_TOKENS."""
        return self.weights + self.kv_per_token * KV_CACHE_TOKENS + OVERHEAD


@dataclass(frozen=True)
class SuggestedModel:
    """An open model that `llmrun init` suggests."""

    use: str
    size: Size
    note: str = ""


def _bf16(billions: float, layers: int, kv_heads: int, head_dim: int, heads: int) -> Size:
    """Return the size of a model with 16-bit weights and KV cache."""
    return Size(int(billions * 2 * GB), _kv_per_token(layers, kv_heads, head_dim), heads)


def _kv_per_token(layers: int, kv_heads: int, head_dim: int) -> int:
    """Return the bytes of a token's keys and values, 16 bits each."""
    return layers * 2 * kv_heads * head_dim * 2


GATED = "gated: needs the HF_TOKEN of an account that accepted its license"
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": SuggestedModel("chat", _bf16(0.135, 30, 3, 64, 9), "fast enough on CPUs"),
    "Qwen/Qwen3-0.6B": SuggestedModel("chat", _bf16(0.6, 28, 8, 128, 16), "fast enough on CPUs"),
    "Qwen/Qwen3-4B-Instruct-2507": SuggestedModel("chat", _bf16(4, 36, 8, 128, 32)),
    "Qwen/Qwen3-8B": SuggestedModel("chat", _bf16(8.2, 36, 8, 128, 32)),
    "meta-llama/Llama-3.1-8B-Instruct": SuggestedModel("chat", _bf16(8, 32, 8, 128, 32), GATED),
    "openai/gpt-oss-20b": SuggestedModel("chat", Size(14 * GB, _kv_per_token(24, 8, 64), 64), "4-bit weights"),
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": SuggestedModel("chat", _bf16(24, 40, 8, 128, 32)),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": SuggestedModel("chat", _bf16(30.5, 48, 4, 128, 32), "mixture of experts"),
    "Qwen/Qwen3-32B": SuggestedModel("chat", _bf16(32.8, 64, 8, 128, 64)),
    "meta-llama/Llama-3.3-70B-Instruct": SuggestedModel("chat", _bf16(70.6, 80, 8, 128, 64), GATED),
    "openai/gpt-oss-120b": SuggestedModel("chat", Size(65 * GB, _kv_per_token(36, 8, 64), 64), "4-bit weights"),
    "Qwen/Qwen2.5-Coder-7B-Instruct": SuggestedModel("code", _bf16(7.6, 28, 4, 128, 28)),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": SuggestedModel("code", _bf16(30.5, 48, 4, 128, 32), "mixture of experts"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": SuggestedModel("reasoning", _bf16(7.6, 28, 4, 128, 28)),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": SuggestedModel("reasoning", _bf16(70.6, 80, 8, 128, 64)),
    "Qwen/Qwen2.5-VL-7B-Instruct": SuggestedModel("vision", _bf16(8.3, 28, 4, 128, 28)),
    "sentence-transformers/all-MiniLM-L6-v2": SuggestedModel("embed", _bf16(0.023, 0, 0, 0, 12), "fast enough on CPUs"),
    "BAAI/bge-m3": SuggestedModel("embed", _bf16(0.57, 0, 0, 0, 16), "fast enough on CPUs"),
    "Qwen/Qwen3-Embedding-0.6B": SuggestedModel("embed", _bf16(0.6, 28, 8, 128, 16)),
}
USES = tuple(dict.fromkeys(model.use for model in MODELS.values()))


def gpus_for(size: Size, accelerator: str) -> int:
    """Return the GPUs of that kind per replica: the smallest sufficient power of two that divides the heads.

    Raises WeightsError if MAX_GPUS are not enough.
    """
    usable = MEMORY_GB[accelerator] * GB * USABLE
    for count in (1, 2, 4, MAX_GPUS):
        if count * usable >= size.required and (not size.heads or size.heads % count == 0):
            return count
    raise WeightsError(
        f"the model needs {size.required / GB:.0f} GB, but {MAX_GPUS} {accelerator} have "
        f"{MAX_GPUS * usable / GB:.0f} GB usable: choose a larger accelerator, or a smaller or quantized model"
    )


def smallest_accelerator(size: Size) -> str:
    """Return the accelerator that needs the fewest GPUs; the smallest of several. Raises WeightsError."""
    counts: dict[str, int] = {}
    for name in MEMORY_GB:
        try:
            counts[name] = gpus_for(size, name)
        except WeightsError:
            continue
    if not counts:
        gpus_for(size, max(MEMORY_GB, key=lambda name: MEMORY_GB[name]))  # raises
    return min(counts, key=lambda name: (counts[name], MEMORY_GB[name]))


def size_of(source: str, endpoint: str, token: str = "") -> Size:
    """Return the size of a model in a folder, or in a repository of the Hub at `endpoint`. Raises WeightsError."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        config = (folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b""
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return _size_from_config(_parse(config, source), weights)
    repo, _, revision = source.partition("@")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    revision = revision or "main"
    try:
        with httpx.Client(headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as client:
            config = client.get(f"{endpoint}/{repo}/resolve/{revision}/config.json").raise_for_status().content
            info = client.get(f"{endpoint}/api/models/{repo}/revision/{revision}", params={"blobs": "true"})
            files = _parse(info.raise_for_status().content, source).get("siblings") or ()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        forbidden = status in (401, 403)
        raise _unknown_size(
            source, "it is gated or private; set HF_TOKEN" if forbidden else f"{endpoint} returned {status}"
        ) from None
    except httpx.HTTPError as error:
        raise _unknown_size(source, f"cannot connect to {endpoint} ({type(error).__name__})") from None
    sizes = [int(file.get("size") or 0) for file in files if str(file.get("rfilename", "")).endswith(".safetensors")]
    return _size_from_config(_parse(config, source), sum(sizes))


def _unknown_size(source: str, reason: str) -> WeightsError:
    return WeightsError(f"{source}: cannot determine its size: {reason}. Or set --accelerator and --gpus.")


def _parse(data: bytes, source: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise WeightsError(f"{source}: no valid config.json found; is it a model?")
    return parsed


def _size_from_config(config: Mapping[str, Any], weights: int) -> Size:
    """Return the size by a model's config, or by that of its text model in a multimodal one."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, Mapping)
    heads = int(text.get("num_attention_heads") or 0)
    head_dim = int(text.get("head_dim") or (int(text.get("hidden_size") or 0) // heads if heads else 0))
    kv_heads = int(text.get("num_key_value_heads") or heads)
    return Size(weights, _kv_per_token(int(text.get("num_hidden_layers") or 0), kv_heads, head_dim), heads)
