"""Adapters that do not fit are rejected before an engine loads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmrun.lora import ADAPTER_WEIGHTS
from llmrun_runtime.engines.shim.adapter_slots import AdapterError
from llmrun_runtime.engines.shim.peft import check_adapter, read_base
from tests.support.adapters import make_adapter


@pytest.fixture
def base(tmp_path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a base model with two shards."""
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        save_file({name: np.zeros((128, 96), np.float32)}, tmp_path / f"model-{layer}.safetensors")
    return read_base(tmp_path)


def test_an_adapter_that_fits_or_has_unknown_modules_is_accepted(
    base: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    assert len(base) == 2
    check_adapter(make_adapter(tmp_path / "fits", 1, shapes={"q_proj": (96, 128)}), base, 8)
    check_adapter(make_adapter(tmp_path / "packed", 1, shapes={"qkv_proj": (7, 7)}), base, 8)
    check_adapter(make_adapter(tmp_path / "alone", 1), {}, 8)
    assert read_base(tmp_path / "nowhere") == {}


def test_an_adapter_that_does_not_fit_is_rejected(base: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
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
