"""Adapters that do not fit are rejected before an engine loads them; and the patch of vLLM's CPU kernels."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmrun.lora import ADAPTER_WEIGHTS
from llmrun_runtime.engines.shim.adapter_slots import AdapterError
from llmrun_runtime.engines.shim.peft import check_adapter, read_base
from llmrun_runtime.engines.vllm import patches
from tests.support.adapters import make_adapter


@pytest.fixture
def base(tmp_path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a base model with two shards."""
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        save_file({name: np.zeros((128, 96), np.float32)}, tmp_path / f"model-{layer}.safetensors")
    return read_base(tmp_path)


def test_an_adapter_that_fits_is_accepted_and_unknown_modules_are_left_to_the_engine(
    base: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    assert len(base) == 2
    check_adapter(make_adapter(tmp_path / "fits", 1, shapes={"q_proj": (96, 128)}), base, 8)
    check_adapter(make_adapter(tmp_path / "packed", 1, shapes={"qkv_proj": (7, 7)}), base, 8)
    check_adapter(make_adapter(tmp_path / "alone", 1), {}, 8)
    assert read_base(tmp_path / "nowhere") == {}


def test_an_adapter_that_does_not_fit_is_rejected_with_the_cause(
    base: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    def error(folder: Path, max_lora_rank: int = 8) -> str:
        with pytest.raises(AdapterError) as refused:
            check_adapter(folder, base, max_lora_rank)
        assert refused.value.status == 400
        return str(refused.value)

    def adapter(name: str, shape: tuple[int, int]) -> Path:
        return make_adapter(tmp_path / name, 1, shapes={"q_proj": shape})

    assert "q_proj has 128 inputs, expected 96" in error(
        make_adapter(tmp_path / "in", 1, shapes={"q_proj": (128, 128)})
    )
    assert "q_proj has 64 outputs, expected 128" in error(
        make_adapter(tmp_path / "out", 1, shapes={"q_proj": (96, 64)})
    )
    deep = make_adapter(tmp_path / "deep", 1, shapes={"q_proj": (96, 128)}, layers=3)
    assert "it changes model.layers.2.self_attn.q_proj, which this model does not have" in error(deep)
    assert "its rank is 16, but the engine was started for at most 8: deploy again" in error(
        make_adapter(tmp_path / "rank", 1, rank=16)
    )
    for data in (
        b"",
        b"12345678",
        b"\xff" * 100,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}x",
    ):
        (make_adapter(tmp_path / "damaged", 1) / ADAPTER_WEIGHTS).write_bytes(data)
        assert "is damaged" in error(tmp_path / "damaged")
    for text in ("no JSON", "[]", "{}", '{"r": "x"}'):
        (make_adapter(tmp_path / "config", 1) / "adapter_config.json").write_text(text)
        assert "cannot read its adapter_config.json" in error(tmp_path / "config")


def test_rows_of_the_base_model_are_not_changed_by_an_adapter() -> None:
    import torch

    kernels = importlib.reload(importlib.import_module("vllm.lora.ops.torch_ops.lora_ops"))
    assert patches.changes_base_rows(kernels), "vLLM has fixed this: remove the patch"
    patches.patch_cpu_kernels()
    assert not patches.changes_base_rows(kernels)
    rows, stacked, indices = torch.ones(3, 4), torch.ones(2, 5, 4), torch.tensor([-1, 0, 1])
    stacked[1] *= 2
    shrunk = torch.full((3, 5), 9.0)
    kernels.bgmv_shrink(rows, stacked, shrunk, indices, 0.5)
    assert shrunk[:, 0].tolist() == [0, 2, 4]
    for kernel, more in ((kernels.bgmv_expand, (True,)), (kernels.bgmv_expand_slice, (0, 5, True))):
        out = torch.ones(3, 5)
        kernel(rows, stacked, out, indices, *more)
        assert out[:, 0].tolist() == [1, 5, 9]
        kernel(torch.ones(7, 4), stacked, rest := torch.ones(7, 5), indices, *more)
        assert rest.tolist() == torch.ones(7, 5).tolist(), "rows with an unspecified adapter"
