"""What the builders refuse, and what `llmrun export` prints, without a Ray."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrun import SpecError, llm
from llmrun.decorator import build_spec
from llmrun.errors import RequestError
from llmrun.spec import Code, ModelSpec
from llmrun.standalone import lost_alone
from llmrun_runtime.builders import build_openai_app
from llmrun_runtime.builders.read_model import read_model
from tests.support.cluster import Home, write_app


def model(**more: Any) -> type:
    """A class with `@llm`."""
    return llm("org/model", name="one", **more)(type("One", (), {}))


def hooked(module: str) -> type:
    """One with a hook, which is said to be in that module."""
    here = {"__module__": module, "on_request": lambda self, request: request}
    return llm("org/model", name="one")(type("One", (), here))


def deployed() -> ModelSpec:
    """A model whose code lies in control."""
    spec = build_spec({"model": "org/model", "name": "one"})
    return spec.model_copy(update={"code": Code(package="0" * 64, file="app.py", cls="One", hooks=("on_start",))})


class Outer:
    @staticmethod
    def inner() -> type:
        """A class that no module has at its top."""

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
        ([7], "7 is no model"),
        ([object], "object is no model: put @llm on it"),
        ([model(), model()], "the name 'one' belongs to one"),
        ([model(lora="s3://a/b")], "lora= needs control"),
        ([model(gpus=2, nodes=2)], "nodes= needs control"),
        ([model(engine="transformers", task="embed")], "engine='transformers' has no task='embed'"),
        ([FIELDS | {"gpus": "two"}], "gpus='two'"),
        ([FIELDS | {"model": "./weights"}], "weights is looked for on each node: write the whole path"),
        ([FIELDS | {"hooks": ["on_start"]}], "app_file, cls, hooks go together"),
        ([FIELDS | {"app_file": "/app.py", "cls": "One"}], "app_file, cls, hooks go together"),
        ([FIELDS | {"app_file": "/app.py", "cls": "One", "hooks": ["on_end"]}], "there are on_start, on_request"),
        ([FIELDS | {"app_file": "app.py", "cls": "One", "hooks": ["on_start"]}], "app.py is looked for on each node"),
        ([deployed()], "its class's code lies in control"),
        ([hooked("__builtin_nowhere__")], "One has on_request and is in no file"),
        ([Outer.inner()], "inner.<locals>.Inner: a class with hooks stands at the top of its file"),
    ],
)
def test_what_cannot_be_built_is_said_before_anything_starts(models: Any, words: str) -> None:
    with pytest.raises(SpecError) as wrong:
        build_openai_app(models)
    assert words in str(wrong.value) and "\n" not in str(wrong.value)


def test_paths_start_at_the_classs_file() -> None:
    here = llm("./weights", name="one")(type("One", (), {"__module__": __name__}))
    assert read_model(here)[0].path == str(Path(__file__).parent / "weights")


def test_what_does_nothing_without_control_is_known() -> None:
    spec, _ = read_model(model(rpm=5, schedule="Mon-Fri 08:00-18:00 UTC"))
    assert lost_alone(spec).startswith("one: schedule=, rpm= does nothing without control")
    assert lost_alone(read_model(model())[0]) == ""


def test_an_answer_that_is_an_error_comes_over_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(RequestError("one answered 400: no", 400, {"error": {"message": "no"}})))
    assert (str(error), error.status, error.body) == ("one answered 400: no", 400, {"error": {"message": "no"}})


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
    (one, no_file), (other, file) = map(read_model, application["args"]["models"])
    assert one.path == str(tmp_path / "weights") and one.gpu_count == 2 and not no_file
    assert one.env["T"].secret == "TOKEN" and one.engine_args == {"max_model_len": "512"}  # type: ignore[union-attr]
    assert file == str(tmp_path / "app.py") and other.code and other.code.hooks == ("on_request",)
    assert other.gpu_count == 0.5
    assert home.ok("export", f"{tmp_path / 'app.py'}::Other").count("name: o") == 1


def test_export_leaves_out_what_nobody_could_serve_and_says_what_is_lost(home: Home, tmp_path: Path) -> None:
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
    assert [found["name"] for found in application["args"]["models"]] == ["one", "hooked"]
    assert "left out: adapted: lora= needs control" in done.stderr
    assert "one: rpm= does nothing without control" in done.stderr
    assert f"hooked: for on_start {app} must lie there on every node" in done.stderr
    assert "nothing that could be exported" in home.fails("export", f"{app}::Adapted")


def test_export_says_what_it_wants(home: Home, tmp_path: Path) -> None:
    assert "say what: an app file" in home.fails("export")
    assert "say what: an app file" in home.fails("export", "app.py", "--all")
    assert "nothing of llmrun's answers" in home.fails("export", "--all")
    assert "there is no such file" in home.fails("export", tmp_path / "none.py")
