"""How much memory a model wants and accelerators have: what `llmrun init` suggests from. Pure, but for reading configs.

Figures of models are those of their `config.json` and of the files in their repositories; of accelerators the makers'.
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
# By the names that Ray gives them (`ray.util.accelerators`).
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
# vLLM's default share of a GPU, and what it needs beside weights and KV cache.
USABLE, OVERHEAD = 0.9, 2 * GB
# Weights that a CPU reads fast enough to answer somebody.
SMALL = 2 * GB
# Tokens of requests that are answered at once, for which there should be room.
TOKENS = 32_768
MOST_GPUS = 8
TIMEOUT_S = 20


@dataclass(frozen=True)
class Size:
    """What a model takes: bytes of its weights, bytes of KV cache for one token, and heads that can be spread."""

    weights: int
    kv: int = 0
    heads: int = 0

    @property
    def wanted(self) -> int:
        """Bytes in all, for TOKENS tokens at once."""
        return self.weights + self.kv * TOKENS + OVERHEAD


@dataclass(frozen=True)
class ModelSize:
    """A well-known open model."""

    use: str
    size: Size
    note: str = ""


def _of(billions: float, layers: int, kv_heads: int, head: int, heads: int, bytes_each: float = 2) -> Size:
    return Size(int(billions * bytes_each * GB), layers * 2 * kv_heads * head * 2, heads)


GATED = "gated: needs HF_TOKEN of an account that has accepted its licence"
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelSize("chat", _of(0.135, 30, 3, 64, 9), "answers on CPUs"),
    "Qwen/Qwen3-0.6B": ModelSize("chat", _of(0.6, 28, 8, 128, 16), "answers on CPUs"),
    "Qwen/Qwen3-4B-Instruct-2507": ModelSize("chat", _of(4, 36, 8, 128, 32)),
    "Qwen/Qwen3-8B": ModelSize("chat", _of(8.2, 36, 8, 128, 32)),
    "meta-llama/Llama-3.1-8B-Instruct": ModelSize("chat", _of(8, 32, 8, 128, 32), GATED),
    "openai/gpt-oss-20b": ModelSize("chat", Size(14 * GB, 24 * 2 * 8 * 64 * 2, 64), "4 bits"),
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": ModelSize("chat", _of(24, 40, 8, 128, 32)),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": ModelSize("chat", _of(30.5, 48, 4, 128, 32), "mixture of experts"),
    "Qwen/Qwen3-32B": ModelSize("chat", _of(32.8, 64, 8, 128, 64)),
    "meta-llama/Llama-3.3-70B-Instruct": ModelSize("chat", _of(70.6, 80, 8, 128, 64), GATED),
    "openai/gpt-oss-120b": ModelSize("chat", Size(65 * GB, 36 * 2 * 8 * 64 * 2, 64), "4 bits"),
    "Qwen/Qwen2.5-Coder-7B-Instruct": ModelSize("code", _of(7.6, 28, 4, 128, 28)),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": ModelSize("code", _of(30.5, 48, 4, 128, 32), "mixture of experts"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ModelSize("reasoning", _of(7.6, 28, 4, 128, 28)),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": ModelSize("reasoning", _of(70.6, 80, 8, 128, 64)),
    "Qwen/Qwen2.5-VL-7B-Instruct": ModelSize("vision", _of(8.3, 28, 4, 128, 28)),
    "sentence-transformers/all-MiniLM-L6-v2": ModelSize("embed", _of(0.023, 0, 0, 0, 12), "answers on CPUs"),
    "BAAI/bge-m3": ModelSize("embed", _of(0.57, 0, 0, 0, 16), "answers on CPUs"),
    "Qwen/Qwen3-Embedding-0.6B": ModelSize("embed", _of(0.6, 28, 8, 128, 16)),
}
USES = tuple(dict.fromkeys(known.use for known in MODELS.values()))


def gpus_for(size: Size, accelerator: str) -> int:
    """GPUs of that kind that one replica wants: the least power of two that divides its heads. Raises WeightsError."""
    each = MEMORY_GB[accelerator] * GB * USABLE
    for count in (1, 2, 4, MOST_GPUS):
        if count * each >= size.wanted and (not size.heads or size.heads % count == 0):
            return count
    text = f"it wants {size.wanted / GB:.0f} GB, and {MOST_GPUS} {accelerator} have {MOST_GPUS * each / GB:.0f}"
    raise WeightsError(f"{text} that vLLM can use: choose a larger accelerator, or a smaller or quantized model")


def smallest(size: Size) -> str:
    """The accelerator that is enough with the fewest GPUs, and of those the smallest. Raises WeightsError."""
    fits: dict[str, int] = {}
    for name in MEMORY_GB:
        try:
            fits[name] = gpus_for(size, name)
        except WeightsError:
            continue
    if not fits:
        gpus_for(size, max(MEMORY_GB, key=lambda name: MEMORY_GB[name]))
    return min(fits, key=lambda name: (fits[name], MEMORY_GB[name]))


def size_of(model: str, endpoint: str, token: str = "") -> Size:
    """Of a model that is not in MODELS: from a folder, or from its repository on the Hub. Raises WeightsError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        config = _parsed((folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b"", model)
        return _read(config, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    repo, _, revision = model.partition("@")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    revision = revision or "main"
    try:
        with httpx.Client(headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as client:
            said = client.get(f"{endpoint}/{repo}/resolve/{revision}/config.json").raise_for_status().content
            about = client.get(f"{endpoint}/api/models/{repo}/revision/{revision}", params={"blobs": "true"})
            files = _parsed(about.raise_for_status().content, model).get("siblings") or ()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        why = "it is gated or private: set HF_TOKEN" if status in (401, 403) else f"{endpoint} answered {status}"
        raise WeightsError(f"{model}: its size is not known ({why}): say --accelerator, and --gpus") from None
    except httpx.HTTPError as error:
        why = f"{endpoint} cannot be asked: {type(error).__name__}"
        raise WeightsError(f"{model}: its size is not known ({why}): say --accelerator, and --gpus") from None
    sizes = [int(file.get("size") or 0) for file in files if str(file.get("rfilename", "")).endswith(".safetensors")]
    return _read(_parsed(said, model), sum(sizes))


def _parsed(data: bytes, model: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise WeightsError(f"{model}: it has no config.json that can be read: is it a model?")
    return found


def _read(config: Mapping[str, Any], weights: int) -> Size:
    """From a model's configuration, or from that of its part that makes text."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, Mapping)
    heads = int(text.get("num_attention_heads") or 0)
    head = int(text.get("head_dim") or (int(text.get("hidden_size") or 0) // heads if heads else 0))
    kv_heads = int(text.get("num_key_value_heads") or heads)
    return Size(weights, int(text.get("num_hidden_layers") or 0) * 2 * kv_heads * head * 2, heads)
