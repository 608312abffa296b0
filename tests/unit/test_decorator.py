"""`@llm`: specs from valid arguments, errors for invalid ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmrun
from llmrun import LLMOptions, LoRA, Secret, SpecError, deploy, llm
from llmrun.app_file import load_file
from llmrun.decorator import hooks_of, spec_of
from llmrun.docstrings import argument_docstrings, attribute_docstrings
from llmrun.engine_args import parse_flags
from llmrun.errors import AppError
from llmrun.markers import Marker, marked
from llmrun.spec import ModelSpec, literal_secrets, to_label
from llmrun.weights import is_path


def spec(model: str = "org/model", **arguments: Any) -> ModelSpec:
    """Return the spec of a class named `QwenChat`."""
    result = spec_of(llm(model, **arguments)(type("QwenChat", (), {})))
    assert result
    return result


def test_a_model_alone_is_enough() -> None:
    default = spec()
    assert (default.name, default.min_replicas, default.max_replicas, default.idle_timeout) == ("qwen-chat", 0, 1, 300)
    assert ModelSpec.model_validate_json(default.model_dump_json()) == default


def test_public_names() -> None:
    assert llmrun.__all__ == [
        "Deployment",
        "LLMOptions",
        "LLMRunError",
        "LoRA",
        "RequestContext",
        "Secret",
        "SpecError",
        "Weights",
        "__version__",
        "deploy",
        "llm",
    ]


def test_every_option_is_a_field_of_the_spec_and_has_a_description() -> None:
    options = LLMOptions.__annotations__.keys()
    assert list(options) == [name for name in ModelSpec.model_fields if name not in ("model", "code")]
    assert attribute_docstrings(LLMOptions).keys() == options
    assert [*argument_docstrings(llm)] == ["model", *options], "help(llm) shows every option"


def test_a_type_checker_refuses_wrong_options() -> None:
    """The ignore comments are the test: with `warn_unused_ignores`, mypy reports one that is not needed."""
    with pytest.raises(SpecError, match=r"min_replica=1: did you mean min_replicas="):
        llm("org/model", min_replica=1)  # type: ignore[call-arg]
    with pytest.raises(SpecError, match="max_replicas='x'"):
        llm("org/model", max_replicas="x")(type("Model", (), {}))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="task='translate'"):
        llm("org/model", task="translate")(type("Model", (), {}))  # type: ignore[arg-type]


def test_none_means_the_default() -> None:
    assert spec(name=None, accelerator=None, gpus=None, lora=None, schedule=None, env=None) == spec()


def test_a_class_is_deployed_only_from_a_file_and_not_on_import(tmp_path: Path) -> None:
    cls: Any = llm("org/model")(type("Model", (), {"__module__": "nowhere"}))
    for call in (lambda: deploy(cls), cls.deploy):
        with pytest.raises(AppError, match="Model is not defined in a file"):
            call()
    with pytest.raises(AppError, match="Path is not a model: put @llm on it"):
        deploy(Path)
    app = tmp_path / "app_that_deploys.py"
    app.write_text("from llmrun import llm\n\n@llm('org/model')\nclass Model: ...\n\nModel.deploy()\n")
    with pytest.raises(AppError, match="was called on import"):
        load_file(app)
    own = type("Own", (), {"deploy": lambda self: 1})
    assert llm("org/model")(own)().deploy() == 1, "a class keeps its own deploy"


def test_import_is_light_and_quick() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import llmrun; t = time.perf_counter() - t\n"
        "heavy = {'ray', 'vllm', 'torch', 'transformers', 'typer', 'httpx'} & set(sys.modules)\n"
        "print(t, sorted(heavy))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    times = sorted(float(run.stdout.split()[0]) for run in runs)
    assert all(run.stdout.split(maxsplit=1)[1].strip() == "[]" for run in runs)
    assert times[0] < 0.3, times


def test_help_loads_neither_ray_nor_engines() -> None:
    code = (
        "import sys; from llmrun_cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'ray', 'vllm', 'torch', 'llmrun_runtime'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "deploy" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"min_replica": 1}, ["unknown option min_replica=1", "did you mean min_replicas="]),
        ({"quux": 1}, ["unknown option quux=1", "available: model, name, aliases"]),
        ({"min_replicas": -1}, ["min_replicas=-1", "greater than or equal to 0"]),
        ({"min_replicas": 3}, ["min_replicas=3", "max_replicas=1", "raise max_replicas"]),
        ({"max_replicas": 0}, ["max_replicas=0"]),
        ({"name": "No_Label"}, ["name='No_Label'", "DNS label", "'no-label'"]),
        ({"name": ""}, ["name=''", "DNS label"]),
        ({"aliases": "org/model"}, ["aliases='org/model'", "must be a list: aliases=['org/model']"]),
        ({"aliases": ["a b"]}, ["aliases='a b'"]),
        ({"aliases": ["x", "x"]}, ["duplicate alias"]),
        ({"aliases": ["qwen-chat"]}, ["aliases='qwen-chat'", "own name"]),
        ({"accelerator": "A10G:2", "gpus": 3}, ["accelerator: 2", "gpus: 3", "set only one of them"]),
        ({"accelerator": "A10G:x"}, ["accelerator='A10G:x'", "'A10G:2'"]),
        ({"accelerator": []}, ["accelerator=[]"]),
        ({"accelerator": 7}, ["accelerator=7", "'A10G'"]),
        ({"accelerator": "cpu", "gpus": 1}, ["gpus=1", "accelerator='cpu'"]),
        ({"accelerator": ["cpu", "A10G"]}, ["'cpu' cannot be combined"]),
        ({"gpus": 1, "engine_args": "-tp 2"}, ["gpus: 1", "tensor_parallel_size: 2"]),
        ({"cpus": 0}, ["cpus=0"]),
        ({"idle_timeout": "soon"}, ["idle_timeout='soon'"]),
        ({"idle_timeout": 0}, ["idle_timeout=0"]),
        ({"target_ongoing_requests": 500}, ["target_ongoing_requests=500", "max_ongoing_requests=256"]),
        ({"engine_args": "--port 1"}, ["engine_args='port'", "reserved by llmrun"]),
        ({"engine_args": {"served-model-name": "x"}}, ["served_model_name", "name="]),
        ({"engine_args": "8192 --x"}, ["'8192'", "flags start with '--'"]),
        ({"env": {"A": 1}}, ["env='A'", "must be a string or a Secret, not int"]),
        ({"env": "A=1"}, ["env: must be a dict"]),
        ({"gpus": 0, "accelerator": "A10G"}, ["gpus=0", "conflicts with accelerator='A10G'"]),
        ({"gpus": 1.5}, ["gpus=1.5", "a fraction of one GPU (0.5)"]),
        ({"gpus": 0.5, "engine_args": "-tp 2"}, ["gpus: 0.5", "tensor_parallel_size: 2"]),
        ({"gpus": 8, "engine_args": "-tp 2 -pp 2"}, ["gpus: 8", "pipeline_parallel_size: 2"]),
        ({"gpus": 3, "engine_args": "-pp 2"}, ["gpus: 3", "pipeline_parallel_size: 2"]),
        ({"gpus": 3, "nodes": 2}, ["nodes=2: every node needs the same number of GPUs", "gpus=4"]),
        ({"nodes": 2}, ["nodes=2: every node needs the same number"]),
        ({"accelerator": "cpu", "nodes": 2}, ["nodes=2: every node needs the same number"]),
        ({"gpus": 4, "engine_args": "--nnodes 2"}, ["engine_args='nnodes'", "use nodes="]),
        ({"engine_args": "-tp two"}, ["tensor_parallel_size='two'", "must be a number of GPUs"]),
        ({"engine_args": "--x 'y"}, ["engine_args=", "No closing quotation"]),
        ({"env": {"A B": "x"}}, ["env='A B'"]),
        ({"env": {"LLMRUN_HOME": "x"}}, ["env='LLMRUN_HOME'", "reserved by llmrun"]),
        ({"requirements": "numpy"}, ["requirements='numpy'", "must be a list"]),
        ({"requirements": ["numpy", "--index-url=http://a"]}, ["requirements='--index-url=http://a'", "not an option"]),
        ({"requirements": ["numpy; import os"]}, ["requirements='numpy; import os'", "must be a package, like"]),
        ({"requirements": ["numpy scipy"]}, ["requirements='numpy scipy'", "must be a package, like"]),
        ({"requirements": [" -r x.txt"]}, ["requirements=' -r x.txt'", "must be a package", "UV_INDEX"]),
    ],
)
def test_an_invalid_argument_is_refused_with_a_fix(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        spec(**arguments)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_an_invalid_use_of_the_decorator_is_refused() -> None:
    with pytest.raises(SpecError, match=r'@llm on Thing: a model is required: write @llm\("org/model"\)'):
        llm(type("Thing", (), {}))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="model=''"):
        llm()
    with pytest.raises(SpecError, match="must be applied to a class"):
        llm("org/model")(lambda: None)  # type: ignore[type-var]

    class Hooked:
        def on_request(self) -> None: ...

    with pytest.raises(SpecError, match=r"Hooked.on_request must take \(self, request\)"):
        llm("org/model")(Hooked)


def test_a_subclass_is_not_a_model() -> None:
    base = llm("org/model")(type("Base", (), {"on_start": lambda self: None}))
    child = type("Child", (base,), {})
    assert spec_of(base) and spec_of(child) is None
    assert hooks_of(child) == ("on_start",)


@pytest.mark.parametrize(
    ("arguments", "gpus", "kinds"),
    [
        ({"accelerator": "A10G"}, 1, ("A10G",)),
        ({"accelerator": "A10G:2"}, 2, ("A10G",)),
        ({"accelerator": "A10G:2", "gpus": 2}, 2, ("A10G",)),
        ({"accelerator": ["H100", "A100"]}, 1, ("H100", "A100")),
        ({"accelerator": ["H100:4", "A100:4"]}, 4, ("H100", "A100")),
        ({"engine_args": {"tensor-parallel-size": 2}}, 2, None),
        ({"engine_args": "-tp 2 -pp 2 -dp 2"}, 8, None),
        ({"gpus": 4, "engine_args": "-pp 2"}, 4, None),
        ({"gpus": 0.25}, 0.25, None),
        ({"gpus": 2.0}, 2, None),
    ],
)
def test_gpus_of_a_replica(arguments: dict[str, Any], gpus: float, kinds: tuple[str, ...] | None) -> None:
    result = spec(**arguments)
    assert result.gpu_count == gpus
    assert (result.accelerator.kinds if result.accelerator else None) == kinds


def test_engine_args_are_a_mapping_or_pasted_flags() -> None:
    flags = "--max-model-len 8192 --enable-x --no-foo --seed=-1 --stop a b --revision 0012 -O3 -tp 2 --a-b.c_d 1"
    assert parse_flags(flags) == {
        "max_model_len": "8192",
        "enable_x": True,
        "no_foo": True,
        "seed": "-1",
        "stop": ["a", "b"],
        "revision": "0012",
        "optimization_level": "3",
        "tensor_parallel_size": "2",
        "a_b.c_d": "1",
    }
    assert spec(engine_args={"max-model-len": "8192"}) == spec(engine_args="--max-model-len 8192")


def test_a_spec_contains_only_the_name_of_a_secret() -> None:
    result = spec(env={"HF_TOKEN": Secret("MY_TOKEN")})
    assert result.model_dump(mode="json")["env"] == {"HF_TOKEN": {"secret": "MY_TOKEN"}}


def test_invalid_secrets_and_models_are_refused() -> None:
    with pytest.raises(SpecError, match=r"Secret\('MY TOKEN'\): must name an environment variable"):
        Secret("MY TOKEN")
    with pytest.raises(SpecError, match=r"model='../x': a path must start with"):
        spec("../x")


def test_fingerprints_show_whether_a_change_needs_a_restart() -> None:
    one, two = spec(), spec(max_replicas=2)
    with pytest.raises(ValueError, match="frozen"):
        one.name = "x"  # type: ignore[misc]
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint(soft=False) == two.fingerprint(soft=False)
    assert one.fingerprint(soft=False) != spec(cpus=2).fingerprint(soft=False)
    bucket_b, bucket_c = spec(lora="s3://a/b"), spec(lora=LoRA("s3://a/c", refresh=5))
    assert bucket_b.fingerprint() != bucket_c.fingerprint()
    assert bucket_b.fingerprint(soft=False) == bucket_c.fingerprint(soft=False)
    assert bucket_b.fingerprint(soft=False) != spec(lora=LoRA("s3://a/b", max_loaded=2)).fingerprint(soft=False)
    assert bucket_b.fingerprint(soft=False) != one.fingerprint(soft=False)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("QwenChat", "qwen-chat"),
        ("SmolLM2", "smol-lm2"),
        ("Qwen2.5-7B-Instruct", "qwen2-5-7b-instruct"),
        ("my_app", "my-app"),
        ("Qwen2Chat", "qwen2-chat"),
        ("HTTPServer", "http-server"),
        ("___", ""),
        ("x" * 80, "x" * 63),
    ],
)
def test_names_become_labels(text: str, label: str) -> None:
    assert to_label(text) == label


def test_paths_are_distinguished_from_other_sources() -> None:
    assert all(map(is_path, ["/models/x", "./x", "~/x", "file:///x"]))
    assert not any(map(is_path, ["org/name", "s3://bucket/x", "hf://org/name", "org/name@main"]))


def test_markers_of_options() -> None:
    assert marked(ModelSpec, Marker.NO_RESTART) == (
        "weights_nodes",
        *("min_replicas", "max_replicas", "idle_timeout", "schedule", "min_uptime", "evictable"),
        "max_wait_for_room",
        *("target_ongoing_requests", "max_ongoing_requests", "max_queued"),
        *("rpm", "tpm", "max_in_flight", "max_output_tokens", "log_engine_metrics"),
    )
    assert marked(LoRA, Marker.NO_RESTART) == ("path", "adapters", "refresh")
    assert marked(ModelSpec, Marker.NEEDS_CONTROL) == (
        *("weights_nodes", "schedule", "min_uptime", "evictable", "max_wait_for_room"),
        *("rpm", "tpm", "max_in_flight", "max_output_tokens", "log_engine_metrics"),
    )


def test_secrets_that_are_written_into_the_file_are_warned_of() -> None:
    one = spec(env={"HF_TOKEN": "hf_x", "MY_PASSWORD": "x", "TOKENIZERS_PARALLELISM": "true", "API_KEY": Secret("K")})
    assert [line.partition(" is stored")[0] for line in literal_secrets([one])] == [
        "qwen-chat: env='HF_TOKEN'",
        "qwen-chat: env='MY_PASSWORD'",
    ]
