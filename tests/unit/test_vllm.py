"""The installed vLLM: the tool parsers that llmrun selects, and the patch of its CPU kernels."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from llmrun_runtime.engines.base import CORES_ENV
from llmrun_runtime.engines.vllm import cpu_cores, patches
from llmrun_runtime.engines.vllm.tool_parsers import BY_TEMPLATE, BY_TYPE


def test_every_tool_parser_exists() -> None:
    """Read vLLM's table of parsers from its source: importing it takes 5 s."""
    spec = importlib.util.find_spec("vllm")
    assert spec and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "tool_parsers" / "__init__.py"
    (parsers,) = [
        node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TOOL_PARSERS_TO_REGISTER"
    ]
    available = ast.literal_eval(parsers).keys()
    assert {*BY_TYPE.values(), *(name for _, name in BY_TEMPLATE)} <= available


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from importing torch
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


@pytest.mark.parametrize(
    ("ours", "authors", "cores"),
    [
        ("", "", []),
        ("0,2", "", [0, 2]),
        ("0", "1-3,6", [1, 2, 3, 6]),
        ("", "auto", []),
        ("", "nobind", []),
        ("", "0-1|2-3", []),
    ],
)
def test_the_cores_of_a_worker(monkeypatch: pytest.MonkeyPatch, ours: str, authors: str, cores: list[int]) -> None:
    monkeypatch.setenv(CORES_ENV, ours)
    monkeypatch.setenv(cpu_cores.BIND_ENV, authors)
    assert cpu_cores.chosen_cores() == cores
