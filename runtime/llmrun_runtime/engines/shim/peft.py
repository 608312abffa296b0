"""What an adapter in PEFT's format says of itself, and whether it fits a base model. Reads headers, no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from llmrun.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_rank
from llmrun_runtime.engines.shim.adapter_slots import AdapterError

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
# https://github.com/huggingface/safetensors#format
LENGTH_BYTES, MOST_HEADER_BYTES = 8, 100 * 2**20
Shapes = dict[str, tuple[int, ...]]


def check_adapter(folder: Path, base: Mapping[str, tuple[int, ...]], max_rank: int) -> None:
    """Raises AdapterError for one that is damaged, of too high a rank, or for another model.

    `base`: the shapes of the base model's tensors. Modules of a kind that it has not (packed, quantized) are the
    engine's to judge. vLLM copies what is too small into a part of its slot, leaves out layers that it has not, and
    says nothing.
    """
    try:
        rank = read_rank((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(f"its {ADAPTER_CONFIG} cannot be read ({error})", 400) from None
    if rank > max_rank:
        text = f"its rank is {rank}, and the engine was started for {max_rank} at most: deploy again"
        text += " (lora=LoRA(…, max_rank=) says otherwise, if it is written)"
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
            wanted = base.get(f"{module}.weight")
            if not wanted and module.rpartition(".")[2] in kinds and _tail(f"{module}.weight") not in tails:
                raise AdapterError(f"it is for another base model: it changes {module}, which is not in this one", 400)
            if wanted and len(shape) == 2 == len(wanted) and shape[side] != wanted[side]:
                what = "takes" if end == A else "gives"
                text = f"it is for another base model: its {module} {what} {shape[side]} values, here {wanted[side]}"
                raise AdapterError(text, 400)


def _tail(name: str) -> str:
    """From its layer on: what is before that differs between names of one model."""
    _, layers, rest = name.rpartition("layers.")
    return layers + rest


def read_base(folder: Path) -> Shapes:
    """The shapes of a model's tensors, by name; none where there are no safetensors."""
    found: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        found |= read_shapes(file)
    return found


def read_shapes(file: Path) -> Shapes:
    """The shapes of a safetensors file's tensors. Raises OSError; ValueError if the file is none, or is not whole."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if not 0 < length <= min(MOST_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError("it has no header of safetensors")
        header = json.loads(opened.read(length))
    try:
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except (AttributeError, LookupError, TypeError):
        raise ValueError("its header is none of safetensors") from None
    if LENGTH_BYTES + length + end != size:
        raise ValueError(f"it has {size} bytes where its header says {LENGTH_BYTES + length + end}")
    return shapes
