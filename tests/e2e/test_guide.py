"""Run the examples for each part of Ray Serve LLM's guide (docs/how-to/coming-from-ray-serve-llm.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun_cli.app_files.python_file import load_app
from llmrun_cli.app_files.yaml_file import read_yaml
from tests.support.adapters import SMOL, SMOL_LAYERS, make_adapter
from tests.support.cluster import REPO, SMOLLM2, Home
from tests.support.vision import make_tiny_vlm, picture

GUIDE = REPO / "examples/guide"


@pytest.fixture(scope="module")
def guide(cluster: Home, tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Iterator[dict[str, str]]:
    """Deploy the app with local weights; yield the environment for OpenAI clients."""
    folder = tmp_path_factory.mktemp("guide")
    for seed, name in enumerate(("legal", "sql")):
        make_adapter(folder / "adapters" / name, seed=seed, shapes=SMOL, layers=SMOL_LAYERS)
    weights = {"MODEL": SMOLLM2, "EMBEDDER": minilm, "EYES": make_tiny_vlm(folder / "vlm")}
    env = {name: str(place) for name, place in weights.items()} | {"ADAPTERS": str(folder / "adapters")}
    cluster.ok("deploy", GUIDE / "app.py", "--lazy", **env)
    yield {**os.environ, "OPENAI_BASE_URL": f"{cluster.url}/v1", "OPENAI_API_KEY": "none"}
    cluster.ok("delete", "--app", "guide", "--yes")


def printed_lines(example: str, env: dict[str, str], *arguments: str | Path) -> list[str]:
    """Run an example and return the lines that it prints."""
    command = [sys.executable, GUIDE / example, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_structured_output_and_tool_calls(guide: dict[str, str]) -> None:
    parsed, bare, choice, pattern = printed_lines("structured_output.py", guide)
    assert parsed.startswith("parsed: city=") and bare.split(": ")[1] in ("Europe", "Asia", "Africa")
    assert choice in ("structured: yes", "structured: no") and pattern[-3] == "-"
    named, auto = printed_lines("tool_calls.py", guide)
    assert "'name': 'weather'" in named and "Paris" in named and auto.split(": ")[1] in ("stop", "length", "tool_calls")


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_embeddings_vision_and_adapters(guide: dict[str, str], tmp_path: Path) -> None:
    assert printed_lines("embeddings.py", guide) == ["nearest: a little village", "first: a little village"]
    (tmp_path / "red.png").write_bytes(picture((255, 0, 0)))
    assert int(printed_lines("vision.py", guide, tmp_path / "red.png")[0].rpartition(" ")[2]) > 4
    answers = dict(line.split(": ", 1) for line in printed_lines("adapters.py", guide))
    assert answers.keys() == {"adapted", "adapted:legal", "adapted:sql"} and len(set(answers.values())) == 3


def test_gpu_examples_load() -> None:
    counts = {item.spec.name: (item.spec.gpu_count, item.spec.nodes) for item in load_app(GUIDE / "placement.py")[0]}
    assert counts == {
        "first-there-is": (1, 1),
        "tensor-parallel": (4, 1),
        "pipelined": (4, 1),
        "half-a-gpu": (0.5, 1),
        "two-nodes": (16, 2),
    }
    (spec,), left_out = read_yaml(GUIDE / "serve_config.yaml")
    assert (spec.name, spec.gpu_count, spec.min_replicas) == ("qwen-0-5b", 2, 0)
    assert any("VLLM_USE_V1" in line for line in left_out)
