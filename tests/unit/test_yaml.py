"""App files in YAML: llmrun's own, their schema, and Ray Serve LLM's configuration files."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from llmrun import LoRA
from llmrun.decorator import build_spec
from llmrun.errors import AppError
from llmrun.spec import ModelSpec
from llmrun_cli.app_files.yaml_file import read_yaml, schema
from tests.support.cluster import REPO

OWN = """\
models:
  - model: Qwen/Qwen2.5-0.5B-Instruct@main
  - name: chat
    model: {source: s3://acme/chat, endpoint_url: http://127.0.0.1:9000}
    accelerator: [A100, H100]
    lora: {path: s3://acme/adapters, max_loaded: 4}
    schedule: Mon-Fri 08:00-18:00 Europe/Berlin
    engine_args: --max-model-len 8192
    env: {HF_TOKEN: {secret: HF_TOKEN}, LEVEL: debug}
  - name: vectors
    model: BAAI/bge-small-en-v1.5
    task: embed
    accelerator: cpu
    engine_args: {max_model_len: 512}
    lora: {legal: acme/legal@v3}
"""
# Examples from the guide of Ray 2.60 (docs.ray.io, serve/llm), in one file.
RAY = """\
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
applications:
- name: llms
  route_prefix: "/"
  import_path: ray.serve.llm:build_openai_app
  args:
    llm_configs:
      - model_loading_config:
          model_id: qwen-0.5b
          model_source: Qwen/Qwen2.5-0.5B-Instruct
        accelerator_type: A10G
        deployment_config:
          autoscaling_config: {min_replicas: 1, max_replicas: 2, initial_replicas: 1, target_ongoing_requests: 64}
          max_ongoing_requests: 128
        engine_kwargs: {tensor_parallel_size: 2, max_model_len: 8192, enable_lora: true, max_lora_rank: 32,
                        tokenizer_pool_size: 2}
        lora_config: {dynamic_lora_loading_path: "s3://anonymous@acme/loras", max_num_adapters_per_replica: 8}
        runtime_env: {env_vars: {VLLM_USE_V1: "1", HF_TOKEN: hf_x}}
        log_engine_metrics: false
      - models/small.yaml
"""
SMALL = """\
model_loading_config:
  model_id: acme/Small_Model
  model_source: {bucket_uri: "s3://anonymous@acme/small"}
accelerator_type: A10
engine_kwargs: {task: embed}
deployment_config: {num_replicas: 2}
placement_group_config: {bundles: [{CPU: 2, GPU: 1}], strategy: STRICT_PACK}
"""


def write(folder: Path, text: str, name: str = "app.yaml") -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_own_files_have_the_options_of_the_decorator(tmp_path: Path) -> None:
    (first, chat, vectors), warnings = read_yaml(write(tmp_path, OWN))
    assert warnings == [] and first.name == "qwen2-5-0-5b-instruct"
    assert chat == build_spec(
        {
            "name": "chat",
            "model": {"source": "s3://acme/chat", "endpoint_url": "http://127.0.0.1:9000"},
            "accelerator": ["A100", "H100"],
            "lora": LoRA("s3://acme/adapters", max_loaded=4),
            "schedule": "Mon-Fri 08:00-18:00 Europe/Berlin",
            "engine_args": "--max-model-len 8192",
            "env": {"HF_TOKEN": {"secret": "HF_TOKEN"}, "LEVEL": "debug"},
        }
    )
    assert vectors.task == "embed" and vectors.lora == LoRA(adapters={"legal": "acme/legal@v3"})


def test_the_schema_accepts_only_valid_files() -> None:
    json_schema = schema()
    jsonschema.Draft202012Validator.check_schema(json_schema)
    jsonschema.validate(yaml.safe_load(OWN), json_schema)
    fields = json_schema["properties"]["models"]["items"]["properties"]
    assert fields.keys() == ModelSpec.model_fields.keys() - {"code", "requirements"}
    assert all(field["description"] for field in fields.values())
    invalid: list[Any] = [
        {"models": []},
        {"models": [{"name": "x"}]},
        {"models": [{"model": "a/b", "acelerator": "cpu"}]},
        {"x": 1},
    ]
    for content in invalid:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content, json_schema)


def test_ray_serve_llm_files_are_converted(tmp_path: Path) -> None:
    write(tmp_path, SMALL, "models/small.yaml")
    (qwen, small), warnings = read_yaml(write(tmp_path, RAY))
    assert qwen == build_spec(
        {
            "name": "qwen-0-5b",
            "aliases": ["qwen-0.5b"],
            "model": "Qwen/Qwen2.5-0.5B-Instruct",
            "accelerator": "A10G",
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 64,
            "max_ongoing_requests": 128,
            "engine_args": {"tensor_parallel_size": 2, "max_model_len": 8192},
            "lora": LoRA("s3://anonymous@acme/loras", max_loaded=8, max_rank=32),
            "env": {"HF_TOKEN": "hf_x"},
            "log_engine_metrics": False,
            "engine": "vllm",
        }
    )
    assert (small.name, small.aliases, small.task) == ("small-model", ("acme/Small_Model",), "embed")
    assert small.model.source == "s3://anonymous@acme/small" and small.model.anonymous
    assert (small.min_replicas, small.max_replicas, small.cpus, small.gpus) == (2, 2, 2, 1)
    assert str(small.accelerator) == "A10G"
    assert [line.partition(" is ignored: ")[0] for line in warnings] == [
        "proxy_location",
        "http_options",
        "applications[0].route_prefix",
        "applications[0].args.llm_configs[0].deployment_config.autoscaling_config.initial_replicas",
        "applications[0].args.llm_configs[0].runtime_env.env_vars.VLLM_USE_V1",
        "applications[0].args.llm_configs[0].engine_kwargs.tokenizer_pool_size",
    ]


def test_a_ray_model_file_keeps_one_replica_like_serve(tmp_path: Path) -> None:
    (one,), warnings = read_yaml(write(tmp_path, "model_loading_config: {model_id: acme/m}\n"))
    assert (one.model.source, one.min_replicas, one.max_replicas, warnings) == ("acme/m", 1, 1, [])


def test_every_field_of_ray_serve_llm_is_handled() -> None:
    """Check the installed Ray. Its module is parsed, not imported, because it needs other packages."""
    file = Path(ray.__file__).parent / "llm" / "_internal" / "serve" / "core" / "configs" / "llm_config.py"
    classes = {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}
    text = (REPO / "cli" / "llmrun_cli" / "app_files" / "ray_serve_llm.py").read_text()
    unknown = [
        line.target.id
        for name in ("LLMConfig", "ModelLoadingConfig", "LoraConfig")
        for line in classes[name].body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_")
        if f'"{line.target.id}"' not in text
    ]
    assert unknown == ["server_cls", "callback_config"], "fields that are not supported"


ONE: dict[str, Any] = {"model_loading_config": {"model_id": "m"}}


def test_spread_bundles_become_nodes(tmp_path: Path) -> None:
    group = {"bundles": [{"CPU": 1, "GPU": 2}] * 2, "strategy": "STRICT_SPREAD"}
    (spec,), _ = read_yaml(write(tmp_path, json.dumps(ONE | {"placement_group_config": group})))
    assert (spec.nodes, spec.gpus, spec.cpus) == (2, 4, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("models: [", "app.yaml:1: expected the node content"),
        ("models:\n- model: a/b\n  model: c/d\n", "duplicate key 'model'"),
        ("[]", "no models found. Write:"),
        ("models: []", "no models found. Write:"),
        ("modles: []", "unknown key 'modles'; must be `models:`"),
        ("models: [x]", "models[0]: must be a mapping"),
        ("models: [{model: a/b, acelerator: cpu}]", "did you mean accelerator=?"),
        ("models: [{model: a/b, gpus: two}]", "gpus='two'"),
        ("models: [{model: {source: a/b, endpoint: x}}]", "models[0]: Weights.__init__() got an unexpected keyword"),
        ("models: [{name: x}]", "models[0]: model='': must be a source of weights"),
        ("models: [{model: a/b}, {model: c/b}]", "models[1]: duplicate model name 'b'"),
        ("models: [{model: a/b, requirements: [x]}]", "requirements is only supported in a .py file"),
        (ONE | {"server_cls": "x:Y"}, "server_cls: not supported; remove it"),
        (ONE | {"llm_engine": "TGI"}, "llm_engine='TGI': must be one of vLLM, SGLang"),
        (ONE | {"engine_kwargs": {"task": "reward"}}, "engine_kwargs.task='reward': must be one of generate, embed"),
        (ONE | {"engine_kwargs": {"enable_lora": True}}, "engine_kwargs.enable_lora: lora_config is required"),
        (ONE | {"engine_kwargs": []}, "engine_kwargs: must be a mapping, not []"),
        (ONE | {"runtime_env": {"pip": ["x"]}}, "runtime_env.pip: not supported; engines use their node's packages"),
        (ONE | {"deployment_config": {"user_config": {}}}, "deployment_config.user_config: not supported; remove it"),
        (
            ONE | {"placement_group_config": {"bundles": [{}, {}], "strategy": "SPREAD"}},
            "nodes=2: every node needs the same",
        ),
        (
            ONE | {"placement_group_config": {"strategy": "DIAGONAL"}},
            "strategy='DIAGONAL': must be one of PACK, STRICT_PACK",
        ),
        (
            ONE | {"placement_group_config": {"bundles": [{"GPU": 1}, {"GPU": 2}], "strategy": "SPREAD"}},
            "bundles: must be the same for each node of an engine",
        ),
        (ONE | {"placement_group_config": {"bundles": [{"TPU": 1}]}}, "bundles[0].TPU: not supported"),
        (ONE | {"lora_config": {}}, "lora_config.dynamic_lora_loading_path is required"),
        ({"model_loading_config": {}}, "model_loading_config.model_id=None: a model name is required"),
        ({"applications": []}, "applications: must be a non-empty list"),
        ({"applications": [{"import_path": "my:app"}]}, "applications[0].import_path='my:app': must be ray.serve.llm"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, content: Any, message: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(AppError) as raised:
        read_yaml(write(tmp_path, text))
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value).partition("\n\n    models:")[0]


def test_missing_files_are_reported(tmp_path: Path) -> None:
    application = {"import_path": "ray.serve.llm:build_openai_app", "args": {"llm_configs": ["./nowhere.yaml"]}}
    with pytest.raises(AppError, match=r"llm_configs\[0\]: file not found: ./nowhere.yaml"):
        read_yaml(write(tmp_path, json.dumps({"applications": [application]})))
    with pytest.raises(AppError, match="cannot read the file: No such file"):
        read_yaml(tmp_path / "missing.yaml")
