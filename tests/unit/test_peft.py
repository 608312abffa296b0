"""Adapters that do not fit are known before an engine has them; and vLLM's CPU kernels, mended."""

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
    """A base model of two shards."""
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        save_file({name: np.zeros((128, 96), np.float32)}, tmp_path / f"model-{layer}.safetensors")
    return read_base(tmp_path)


def test_what_fits_is_taken_and_what_is_unknown_is_the_engines_to_judge(
    base: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    assert len(base) == 2
    check_adapter(make_adapter(tmp_path / "fits", 1, shapes={"q_proj": (96, 128)}), base, 8)
    check_adapter(make_adapter(tmp_path / "packed", 1, shapes={"qkv_proj": (7, 7)}), base, 8)
    check_adapter(make_adapter(tmp_path / "alone", 1), {}, 8)
    assert read_base(tmp_path / "nowhere") == {}


def test_what_does_not_fit_says_why(base: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    def said(folder: Path, most: int = 8) -> str:
        with pytest.raises(AdapterError) as refused:
            check_adapter(folder, base, most)
        assert refused.value.status == 400
        return str(refused.value)

    assert "q_proj takes 128 values, here 96" in said(make_adapter(tmp_path / "in", 1, shapes={"q_proj": (128, 128)}))
    assert "q_proj gives 64 values, here 128" in said(make_adapter(tmp_path / "out", 1, shapes={"q_proj": (96, 64)}))
    deep = make_adapter(tmp_path / "deep", 1, shapes={"q_proj": (96, 128)}, layers=3)
    assert "it changes model.layers.2.self_attn.q_proj, which is not in this one" in said(deep)
    assert "its rank is 16, and the engine was started for 8 at most: deploy again" in said(
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
        assert "is damaged" in said(tmp_path / "damaged")
    for text in ("no JSON", "[]", "{}", '{"r": "x"}'):
        (make_adapter(tmp_path / "config", 1) / "adapter_config.json").write_text(text)
        assert "adapter_config.json cannot be read" in said(tmp_path / "config")


def test_rows_of_the_base_model_get_nothing_of_an_adapter() -> None:
    import torch

    kernels = importlib.reload(importlib.import_module("vllm.lora.ops.torch_ops.lora_ops"))
    assert patches.base_rows_are_changed(kernels), "vLLM does it right now: vllm_fixes is of no use any more"
    patches.mend_cpu_kernels()
    assert not patches.base_rows_are_changed(kernels)
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
        assert rest.tolist() == torch.ones(7, 5).tolist(), "rows whose adapter is not said"
