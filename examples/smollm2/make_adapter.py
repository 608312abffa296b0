"""Creates a small random LoRA adapter for SmolLM2-135M in a folder: `python make_adapter.py FOLDER [SEED]`.

The adapter has PEFT's format. Its weights are random, so the model's answers with it make no sense.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS, RANK = 30, 8
# Input and output width of the attention modules.
MODULES = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}


def main() -> None:
    """Create the folder. The configuration is written last: with it, the folder is an adapter."""
    folder = Path(sys.argv[1])
    random = np.random.default_rng(int(sys.argv[2]) if sys.argv[2:] else 0)
    tensors = {}
    for layer in range(LAYERS):
        for name, (width, height) in MODULES.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = random.normal(0, 1, (RANK, width)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = random.normal(0, 1 / RANK, (height, RANK)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": list(MODULES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
