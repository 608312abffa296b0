"""Reads the headers of an adapter in PEFT's format and checks whether it fits a base model. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmrun.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_lora_rank
from llmrun_runtime.engines.shim.adapter_slots import AdapterError
from llmrun_runtime.safetensors_files import Shapes, read_shapes

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


def check_adapter(folder: Path, base: Mapping[str, tuple[int, ...]], max_lora_rank: int) -> None:
    """Raises AdapterError for an adapter that is damaged, has too high a rank, or is for another base model.

    `base`: the shapes of the base model's tensors. Kinds of modules that it lacks (packed, quantized) are left to the
    engine. vLLM itself copies a tensor that is too small into a part of its slot and ignores unknown layers, without
    an error.
    """
    try:
        rank = read_lora_rank((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read its {ADAPTER_CONFIG} ({error})", 400) from None
    if rank > max_lora_rank:
        text = f"its rank is {rank}, but the engine was started for at most {max_lora_rank}: deploy again"
        text += " (if lora=LoRA(…, max_rank=) is set, increase it)"
        raise AdapterError(text, 400)
    if not (folder / ADAPTER_WEIGHTS).exists():
        return
    try:
        shapes = read_shapes(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError) as error:
        raise AdapterError(f"its {ADAPTER_WEIGHTS} is damaged ({error})", 400) from None
    tails, kinds = {_tail(name) for name in base}, {name.split(".")[-2] for name in base if "." in name}
    for name, shape in shapes.items():
        for end, side in ((A, 1), (B, 0)):
            module = name.removeprefix(PREFIX).removesuffix(end)
            if not name.endswith(end):
                continue
            expected = base.get(f"{module}.weight")
            if not expected and module.rpartition(".")[2] in kinds and _tail(f"{module}.weight") not in tails:
                text = f"it is for another base model: it changes {module}, which this model does not have"
                raise AdapterError(text, 400)
            if expected and len(shape) == 2 == len(expected) and shape[side] != expected[side]:
                what = "inputs" if end == A else "outputs"
                text = f"it is for another base model: {module} has {shape[side]} {what}, expected {expected[side]}"
                raise AdapterError(text, 400)


def _tail(name: str) -> str:
    """Return a tensor's name from its layer on; what is before that can differ between names of one model."""
    _, layers, rest = name.rpartition("layers.")
    return layers + rest


def read_base(folder: Path) -> Shapes:
    """Return the shapes of a model's tensors, by name; empty without safetensors files."""
    shapes: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        shapes |= read_shapes(file)
    return shapes
