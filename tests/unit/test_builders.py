"""Models that the builders reject, and the output of `llmrun export`, without Ray."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrun import SpecError, llm
from llmrun.errors import RequestError
from llmrun.spec import Code, ModelSpec
from llmrun.standalone import check_standalone
from llmrun_runtime.builders import build_openai_app
from llmrun_runtime.builders.read_model import read_model
from tests.support.cluster import Home, write_app
from tests.support.factories import spec


def model(**options: Any) -> type:
    """Return a class with `@llm`."""
    return llm("org/model", name="one", **options)(type("One", (), {}))


def hooked(module: str) -> type:
    """Return a model with a hook, whose class claims to be in that module."""
    members = {"__module__": module, "on_request": lambda self, request: request}
    return llm("org/model", name="one")(type("One", (), members))


def with_stored_code() -> ModelSpec:
    """Return a model whose code is stored in control."""
    return spec().model_copy(update={"code": Code(package="0" * 64, file="app.py", cls="One", hooks=("on_start",))})


class Outer:
    @staticmethod
    def inner() -> type:
        """A class that is not at the top level of a module."""

        @llm("org/model")
        class Inner:
            def on_start(self) -> None: ...

        return Inner


FIELDS = {"name": "one", "model": "org/model"}


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([], "a list of classes with @llm"),
        ("one", "a list of classes with @llm"),
        ({"modells": []}, "a list of classes with @llm"),
        ([7], "7 is not a model"),
        ([object], "object is not a model: decorate it with @llm"),
        ([model(), model()], "name 'one' is used by one"),
        ([model(lora="s3://a/b")], "lora= requires control"),
        ([model(gpus=2, nodes=2)], "nodes= requires control"),
        ([model(engine="transformers", task="embed")], "engine='transformers' does not support task='embed'"),
        ([FIELDS | {"gpus": "two"}], "gpus='two'"),
        ([FIELDS | {"model": "./weights"}], "weights must be an absolute path: each node reads it"),
        ([FIELDS | {"hooks": ["on_start"]}], "app_file, cls, hooks must be given together"),
        ([FIELDS | {"app_file": "/app.py", "cls": "One"}], "app_file, cls, hooks must be given together"),
        ([FIELDS | {"app_file": "/app.py", "cls": "One", "hooks": ["on_end"]}], "Available: on_start, on_request"),
        ([FIELDS | {"app_file": "app.py", "cls": "One", "hooks": ["on_start"]}], "app.py must be an absolute path"),
        ([with_stored_code()], "the code of its class is stored in control"),
        ([hooked("__builtin_nowhere__")], "One has on_request but no source file"),
        ([Outer.inner()], "inner.<locals>.Inner: a class with hooks must be at the top level of its file"),
    ],
)
def test_invalid_models_are_rejected_before_anything_starts(models: Any, words: str) -> None:
    with pytest.raises(SpecError) as raised:
        build_openai_app(models)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_paths_are_relative_to_the_file_of_the_class() -> None:
    cls = llm("./weights", name="one")(type("One", (), {"__module__": __name__}))
    assert read_model(cls)[0].path == str(Path(__file__).parent / "weights")


def test_options_without_effect_are_named() -> None:
    limited, _ = read_model(model(rpm=5, schedule="Mon-Fri 08:00-18:00 UTC"))
    assert check_standalone(limited).startswith("one: schedule=, rpm= has no effect without control")
    assert check_standalone(read_model(model())[0]) == ""


def test_a_request_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(RequestError("one answered 400: no", 400, {"error": {"message": "no"}})))
    assert (str(error), error.status, error.body) == ("one answered 400: no", 400, {"error": {"message": "no"}})


def test_the_builder_reads_the_output_of_export(home: Home, tmp_path: Path) -> None:
    text = """
@llm("./weights", name="one", accelerator="A10G:2", env={"T": Secret("TOKEN")}, engine_args="--max-model-len 512")
class One: ...

@llm("s3://acme/model", name="other", gpus=0.5)
class Other:
    def on_request(self, request): return request
"""
    (application,) = yaml.safe_load(home.ok("export", write_app(tmp_path / "app.py", text)))["applications"]
    assert application["import_path"] == "llmrun_runtime.builders:build_openai_app"
    (one, no_file), (other, file) = map(read_model, application["args"]["models"])
    assert one.path == str(tmp_path / "weights") and one.gpu_count == 2 and not no_file
    assert one.env["T"].secret == "TOKEN" and one.engine_args == {"max_model_len": "512"}  # type: ignore[union-attr]
    assert file == str(tmp_path / "app.py") and other.code and other.code.hooks == ("on_request",)
    assert other.gpu_count == 0.5
    assert home.ok("export", f"{tmp_path / 'app.py'}::Other").count("name: o") == 1


def test_export_skips_models_that_require_control(home: Home, tmp_path: Path) -> None:
    text = """
import ray
from llmrun_runtime.builders import build_openai_app

@llm("org/model", rpm=5)
class One: ...

@llm("org/model", lora="s3://acme/adapters")
class Adapted: ...

@llm("org/model")
class Hooked:
    def on_start(self) -> None: ...

app = build_openai_app([One, Hooked])  # for `serve run app:app`
assert not ray.is_initialized()
"""
    done = home.run("export", app := write_app(tmp_path / "app.py", text))
    assert done.returncode == 0, done.stderr
    (application,) = yaml.safe_load(done.stdout)["applications"]
    assert [model["name"] for model in application["args"]["models"]] == ["one", "hooked"]
    assert "skipped: adapted: lora= requires control" in done.stderr
    assert "one: rpm= has no effect without control" in done.stderr
    assert f"hooked: on_start needs {app} at the same path on every node" in done.stderr


def test_export_errors(home: Home, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app.py", '@llm("org/model", lora="s3://acme/adapters")\nclass Adapted: ...\n')
    assert "no models to export" in home.fails("export", f"{app}::Adapted")
    assert "exactly one of an app file" in home.fails("export")
    assert "exactly one of an app file" in home.fails("export", "app.py", "--all")
    assert "cannot reach llmrun at" in home.fails("export", "--all")
    assert "file not found" in home.fails("export", tmp_path / "none.py")
