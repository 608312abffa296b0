"""`llmrun init`: its app files and suggestions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmrun.errors import LLMRunError, WeightsError
from llmrun_cli.app_files.python_file import load_app
from llmrun_cli.main import app
from llmrun_cli.model_sizes import GB, MEMORY_GB, MODELS, SMALL, Size, gpus_for, size_of, smallest_accelerator
from tests.support.cluster import Home
from tests.support.servers import hub_server


def init(path: Path, *args: str) -> Any:
    """Run `llmrun init PATH ARGS` in this process. Raises its LLMRunError."""
    done = CliRunner().invoke(app, ["init", str(path), *args])
    if isinstance(done.exception, LLMRunError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("model", MODELS)
def test_every_suggested_model_gets_an_accelerator_that_fits(model: str, tmp_path: Path) -> None:
    path = tmp_path / "app.py"
    init(path, "--model", model)
    (loaded,), _ = load_app(path)
    spec = loaded.spec
    size = MODELS[model].size
    assert spec.model.source == model and (spec.task == "embed") == (MODELS[model].use == "embed")
    if size.weights < SMALL:
        assert spec.accelerator is None
        return
    kind = smallest_accelerator(size)
    assert spec.accelerator and spec.accelerator.kinds == (kind,)
    assert spec.gpu_count == gpus_for(size, kind) and size.required <= spec.gpu_count * MEMORY_GB[kind] * GB


def test_flags_are_written_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    more = ["--name", "7b-chat", "--accelerator", "A100-80G", "--gpus", "4", "--lora", "s3://acme/adapters"]
    init(path, "--model", "acme/x", *more, "--max-replicas", "3", "--keep-warm")
    (loaded,), _ = load_app(path)
    spec = loaded.spec
    assert (spec.name, str(spec.accelerator), spec.gpu_count) == ("7b-chat", "A100-80G:4", 4)
    assert spec.lora and str(spec.lora) == "s3://acme/adapters" and (spec.min_replicas, spec.max_replicas) == (1, 3)
    init(path, "--model", "acme/x", "--accelerator", "cpu", "--force")
    (loaded,), _ = load_app(path)
    assert loaded.spec.on_cpu and loaded.spec.name == "x"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--model is required when standard input is not a terminal"),
        (["--use", "poetry"], "--use poetry: must be one of chat"),
        (["--model", "a/b", "--accelerator", "K80", "--gpus", "1"], "--accelerator K80: must be cpu, any, or one of"),
        (["--model", "Qwen/Qwen3-32B", "--accelerator", "T4"], None),
        (
            ["--model", "meta-llama/Llama-3.3-70B-Instruct", "--accelerator", "T4"],
            "the model needs 154 GB, but 8 T4 have 115",
        ),
        (["--model", "Qwen/Qwen3-8B", "--name", "A B"], "must be a DNS label"),
    ],
)
def test_invalid_flags_are_reported(args: list[str], message: str | None, tmp_path: Path) -> None:
    if message is None:
        init(tmp_path / "app.py", *args)
        return
    with pytest.raises(LLMRunError, match=message):
        init(tmp_path / "app.py", *args)
    assert not (tmp_path / "app.py").exists()
    (tmp_path / "app.py").write_text("mine")
    with pytest.raises(LLMRunError, match="already exists"):
        init(tmp_path / "app.py", "--model", "Qwen/Qwen3-8B")
    assert (tmp_path / "app.py").read_text() == "mine"


def test_the_number_of_gpus_divides_the_heads_and_is_a_power_of_two() -> None:
    assert gpus_for(Size(7 * GB), "T4") == 1 and gpus_for(Size(30 * GB), "T4") == 4
    assert gpus_for(Size(14 * GB, heads=28), "T4") == 2
    with pytest.raises(WeightsError, match="the model needs 102 GB"):
        gpus_for(Size(100 * GB, heads=9), "H100")


def test_the_size_of_another_model_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    folder = tmp_path / "acme"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    for config in (text, {"text_config": text}):
        (folder / "config.json").write_text(json.dumps(config))
        assert size_of(str(folder), "") == Size(1000, 2 * 2 * 2 * 64 * 2, 4)
    with hub_server() as hub:
        hub.repos["acme/new"] = folder
        hub.gated.add("acme/gated")
        hub.repos["acme/gated"] = folder
        assert size_of("acme/new", hub.url) == Size(1000, 1024, 4) == size_of("acme/new@main", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        init(tmp_path / "app.py", "--model", "acme/new")
        assert load_app(tmp_path / "app.py")[0][0].spec.accelerator is None, "a model this small is fast enough on CPUs"
        with pytest.raises(WeightsError, match="it is gated or private; set HF_TOKEN"):
            size_of("acme/gated", hub.url)
        with pytest.raises(WeightsError, match=r"cannot determine its size: .*set --accelerator and --gpus"):
            size_of("acme/nothing", hub.url)
    with pytest.raises(WeightsError, match=r"cannot connect to http://127\.0\.0\.1:9 \(ConnectError\)"):
        size_of("acme/new", "http://127.0.0.1:9")
    (folder / "config.json").write_text("no")
    with pytest.raises(WeightsError, match=r"no valid config\.json"):
        size_of(str(folder), "")


def test_missing_flags_are_prompted_for_on_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "app.py"
    code, shown = Home(tmp_path / "home", 1).run_on_a_terminal("init", path, answers="chat\n4\nA10G\n1\n-\n2\ny\n")
    assert code == 0, shown
    (loaded,), _ = load_app(path)
    assert loaded.spec.model.source == "Qwen/Qwen3-8B" and str(loaded.spec.accelerator) == "A10G"
    assert (loaded.spec.min_replicas, loaded.spec.max_replicas) == (1, 2)
