"""`@llm`: what it makes of good arguments, and what it says of bad ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from llmrun import LoRA, Secret, SpecError, llm
from llmrun.decorator import hooks_of, spec_of
from llmrun.spec import ModelSpec, parse_flags, to_label
from llmrun.weights import is_path


def spec(model: str = "org/model", **arguments: Any) -> ModelSpec:
    """The spec of a class called `QwenChat`."""
    made = spec_of(llm(model, **arguments)(type("QwenChat", (), {})))
    assert made
    return made


def test_a_model_alone_is_enough() -> None:
    made = spec()
    assert (made.name, made.min_replicas, made.max_replicas, made.idle_timeout) == ("qwen-chat", 0, 1, 300)
    assert ModelSpec.model_validate_json(made.model_dump_json()) == made


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
        ({"min_replica": 1}, ["min_replica=1", "did you mean min_replicas="]),
        ({"min_replicas": -1}, ["min_replicas=-1", "greater than or equal to 0"]),
        ({"min_replicas": 3}, ["min_replicas=3", "max_replicas=1", "raise max_replicas"]),
        ({"max_replicas": 0}, ["max_replicas=0"]),
        ({"name": "No_Label"}, ["name='No_Label'", "DNS label", "'no-label'"]),
        ({"name": ""}, ["name=''", "DNS label"]),
        ({"aliases": "org/model"}, ["aliases='org/model'", "write a list"]),
        ({"aliases": ["a b"]}, ["aliases='a b'"]),
        ({"aliases": ["x", "x"]}, ["twice"]),
        ({"aliases": ["qwen-chat"]}, ["own name"]),
        ({"accelerator": "A10G:2", "gpus": 3}, ["accelerator says 2", "gpus says 3", "say it once"]),
        ({"accelerator": "A10G:x"}, ["accelerator='A10G:x'", "'A10G:2'"]),
        ({"accelerator": []}, ["accelerator=[]"]),
        ({"accelerator": 7}, ["accelerator=7", "'A10G'"]),
        ({"accelerator": "cpu", "gpus": 1}, ["gpus=1", "accelerator='cpu'"]),
        ({"accelerator": ["cpu", "A10G"]}, ["'cpu' stands alone"]),
        ({"gpus": 1, "engine_args": "-tp 2"}, ["gpus says 1", "tensor_parallel_size says 2"]),
        ({"cpus": 0}, ["cpus=0"]),
        ({"idle_timeout": "soon"}, ["idle_timeout='soon'"]),
        ({"idle_timeout": 0}, ["idle_timeout=0"]),
        ({"target_ongoing_requests": 500}, ["target_ongoing_requests=500", "max_ongoing_requests=256"]),
        ({"engine_args": "--port 1"}, ["engine_args='port'", "llmrun sets it"]),
        ({"engine_args": {"served-model-name": "x"}}, ["served_model_name", "name="]),
        ({"engine_args": "8192 --x"}, ["'8192'", "flags start with '--'"]),
        ({"env": {"A": 1}}, ["env='A'", "a string or a Secret, not int"]),
        ({"env": "A=1"}, ["env: write a dict"]),
        ({"gpus": 0, "accelerator": "A10G"}, ["gpus=0", "accelerator='A10G' is a GPU"]),
        ({"gpus": 1.5}, ["gpus=1.5", "a part of one (0.5)"]),
        ({"gpus": 0.5, "engine_args": "-tp 2"}, ["gpus says 0.5", "tensor_parallel_size says 2"]),
        ({"gpus": 8, "engine_args": "-tp 2 -pp 2"}, ["gpus says 8", "pipeline_parallel_size says 2"]),
        ({"gpus": 3, "engine_args": "-pp 2"}, ["gpus says 3", "pipeline_parallel_size says 2"]),
        ({"gpus": 3, "nodes": 2}, ["nodes=2: each gets the same number of GPUs", "gpus=4"]),
        ({"nodes": 2}, ["nodes=2: each gets the same number"]),
        ({"accelerator": "cpu", "nodes": 2}, ["nodes=2: each gets the same number"]),
        ({"gpus": 4, "engine_args": "--nnodes 2"}, ["engine_args='nnodes'", "use nodes="]),
        ({"engine_args": "-tp two"}, ["tensor_parallel_size='two'", "a number of GPUs"]),
        ({"engine_args": "--x 'y"}, ["engine_args=", "No closing quotation"]),
        ({"env": {"A B": "x"}}, ["env='A B'"]),
        ({"env": {"LLMRUN_HOME": "x"}}, ["llmrun's own"]),
        ({"requirements": "numpy"}, ["requirements='numpy'", "write a list"]),
    ],
)
def test_wrong_arguments_name_argument_value_and_fix(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        spec(**arguments)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_wrong_uses_of_the_decorator() -> None:
    with pytest.raises(SpecError, match=r'@llm on Thing needs a model: write @llm\("org/model"\)'):
        llm(type("Thing", (), {}))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="model=''"):
        llm()
    with pytest.raises(SpecError, match="goes on a class"):
        llm("org/model")(lambda: None)  # type: ignore[type-var]

    class Hooked:
        def on_request(self) -> None: ...

    with pytest.raises(SpecError, match=r"Hooked.on_request must take \(self, request\)"):
        llm("org/model")(Hooked)


def test_a_subclass_is_no_model_of_its_own() -> None:
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
def test_accelerators(arguments: dict[str, Any], gpus: float, kinds: tuple[str, ...] | None) -> None:
    made = spec(**arguments)
    assert made.gpu_count == gpus
    assert (made.accelerator.kinds if made.accelerator else None) == kinds


def test_engine_args_as_names_or_as_pasted_flags() -> None:
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


def test_secrets_keep_their_names_only() -> None:
    made = spec(env={"HF_TOKEN": Secret("MY_TOKEN")})
    assert made.model_dump(mode="json")["env"] == {"HF_TOKEN": {"secret": "MY_TOKEN"}}


def test_wrong_secrets_and_models() -> None:
    with pytest.raises(SpecError, match=r"Secret\('MY TOKEN'\): name a variable"):
        Secret("MY TOKEN")
    with pytest.raises(SpecError, match=r"model='../x': a path begins with"):
        spec("../x")


def test_specs_are_frozen_and_hashed_for_diffs() -> None:
    one, two = spec(), spec(max_replicas=2)
    with pytest.raises(ValueError, match="frozen"):
        one.name = "x"  # type: ignore[misc]
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint(soft=False) == two.fingerprint(soft=False)
    assert one.fingerprint(soft=False) != spec(cpus=2).fingerprint(soft=False)
    here, there = spec(lora="s3://a/b"), spec(lora=LoRA("s3://a/c", refresh=5))
    assert here.fingerprint() != there.fingerprint()
    assert here.fingerprint(soft=False) == there.fingerprint(soft=False)
    assert here.fingerprint(soft=False) != spec(lora=LoRA("s3://a/b", max_loaded=2)).fingerprint(soft=False)
    assert here.fingerprint(soft=False) != one.fingerprint(soft=False)


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
def test_labels(text: str, label: str) -> None:
    assert to_label(text) == label


def test_only_these_are_paths() -> None:
    assert all(map(is_path, ["/models/x", "./x", "~/x", "file:///x"]))
    assert not any(map(is_path, ["org/name", "s3://bucket/x", "hf://org/name", "org/name@main"]))
