"""What the builders refuse, and what `llmrun export` prints, without a Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrun import SpecError, llm
from llmrun_runtime.builders import app as builders
from llmrun_runtime.builders import build_openai_app
from tests.conftest import Home, write_app


def model(**more: Any) -> type:
    """A class with `@llm`."""
    return llm("org/model", name="one", **more)(type("One", (), {}))


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([], "a list of classes with @llm"),
        ("one", "a list of classes with @llm"),
        ({"modells": []}, "a list of classes with @llm"),
        ([7], "7 is no model"),
        ([object], "object is no model: put @llm on it"),
        ([model(), model()], "the name 'one' belongs to one"),
        ([model(lora="s3://a/b")], "lora= needs control"),
        ([model(gpus=2, nodes=2)], "nodes= needs control"),
        ([model(engine="transformers", task="embed")], "engine='transformers' has no task='embed'"),
        ([{"name": "one", "model": "a/b", "gpus": "two"}], "gpus='two'"),
    ],
)
def test_what_cannot_be_built_is_said_before_anything_starts(models: Any, words: str) -> None:
    with pytest.raises(SpecError) as wrong:
        build_openai_app(models)
    assert words in str(wrong.value) and "\n" not in str(wrong.value)


def test_paths_start_at_the_classs_file() -> None:
    here = llm("./weights", name="one")(type("One", (), {"__module__": __name__}))
    assert builders._read(here)[0].path == str(Path(__file__).parent / "weights")


def test_what_does_nothing_without_control_is_known() -> None:
    spec, _ = builders._read(model(rpm=5, schedule="Mon-Fri 08:00-18:00 UTC"))
    assert builders.without_effect(spec) == ["schedule", "rpm"]


def test_what_export_prints_is_read_again(home: Home, tmp_path: Path) -> None:
    text = """
@llm("./weights", name="one", accelerator="A10G:2", env={"T": Secret("TOKEN")}, engine_args="--max-model-len 512")
class One: ...

@llm("s3://acme/model", name="other", gpus=0.5)
class Other:
    def on_request(self, request): return request
"""
    (application,) = yaml.safe_load(home.ok("export", write_app(tmp_path / "app.py", text)))["applications"]
    assert application["import_path"] == "llmrun_runtime.builders:build_openai_app"
    (one, no_file), (other, file) = map(builders._read, application["args"]["models"])
    assert one.path == str(tmp_path / "weights") and one.gpu_count == 2 and not no_file
    assert one.env["T"].secret == "TOKEN" and one.engine_args == {"max_model_len": "512"}  # type: ignore[union-attr]
    assert file == str(tmp_path / "app.py") and other.code and other.code.hooks == ("on_request",)
    assert other.gpu_count == 0.5
    assert home.ok("export", f"{tmp_path / 'app.py'}::Other").count("name: o") == 1


def test_export_says_what_it_wants(home: Home, tmp_path: Path) -> None:
    assert "say what: an app file" in home.fails("export")
    assert "say what: an app file" in home.fails("export", "app.py", "--all")
    assert "nothing of llmrun's answers" in home.fails("export", "--all")
    assert "there is no such file" in home.fails("export", tmp_path / "none.py")
