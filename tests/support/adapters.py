"""Random adapters in PEFT's format, each strong enough to change the model's answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llmrun_runtime.weights.pin import File

Shapes = dict[str, tuple[int, int]]
"""Input and output width of a layer's modules."""
# The tiny Llama of `cluster.make_tiny_weights`.
TINY: Shapes = {"q_proj": (128, 128), "v_proj": (128, 64), "o_proj": (128, 128)}
LAYERS = 2
# SmolLM2-135M.
SMOL: Shapes = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}
SMOL_LAYERS = 30


def make_adapter(
    folder: Path, seed: int, rank: int = 8, scale: float = 1.0, shapes: Shapes = TINY, layers: int = LAYERS
) -> Path:
    """Create an adapter in the folder; a larger `scale` changes answers more."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for name, (width, height) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = random.normal(0, 1, (rank, width)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = random.normal(0, scale / rank, (height, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    config |= {"target_modules": list(shapes), "base_model_name_or_path": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def files(*names: str) -> tuple[File, ...]:
    """Return the files of a listing, one byte each."""
    return tuple(File(name=name, size=1, version=f"v of {name}") for name in names)
