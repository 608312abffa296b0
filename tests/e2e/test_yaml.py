"""YAML app files through the command line: an unchanged Ray Serve LLM file and llmrun's own format."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import jsonschema
import pytest
import yaml
from openai import OpenAI

from tests.support.cluster import Home, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
RAYS = """\
http_options: {{port: 8000}}
applications:
- name: llms
  import_path: ray.serve.llm:build_openai_app
  args:
    llm_configs:
      - model_loading_config: {{model_id: acme/Tiny_Llama, model_source: {weights}}}
        accelerator_config: {{kind: cpu}}
        engine_kwargs: {{max_model_len: 256, tokenizer_pool_size: 2}}
        deployment_config:
          autoscaling_config: {{min_replicas: 0, max_replicas: 1, downscale_to_zero_delay_s: 600}}
          ray_actor_options: {{num_cpus: 0.2}}
        log_engine_metrics: false
"""
OURS = """\
models:
  - {{name: vectors, model: {weights}, task: embed, cpus: 0.2, idle_timeout: 600}}
"""


def test_a_ray_serve_llm_file_is_deployed_unchanged(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(RAYS.format(weights=tiny_weights))
    output = cluster.ok("deploy", path, "--name", "rays")
    assert "! http_options is ignored: set the ingress address with `llmrun up --host --port`" in output
    assert "engine_kwargs.tokenizer_pool_size is ignored: vLLM no longer supports it" in output
    with OpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        answer = client.completions.create(model="acme/Tiny_Llama", prompt="Once", max_tokens=4, temperature=0)
    assert answer.usage and answer.usage.completion_tokens == 4
    listed = {model["id"]: model["llmrun"] for model in httpx.get(f"{cluster.url}/v1/models").json()["data"]}
    assert listed["tiny-llama"]["aliases"] == ["acme/Tiny_Llama"] and listed["tiny-llama"]["max_model_len"] == 256
    assert 'model="tiny-llama",replica="' not in httpx.get(f"{cluster.url}/metrics").text
    assert "no changes" in cluster.ok("deploy", path, "--name", "rays")
    path.write_text(path.read_text().replace("log_engine_metrics: false", "log_engine_metrics: true"))
    assert "without a restart" in cluster.ok("deploy", path, "--name", "rays")
    # The page that was read above is kept for a moment.
    until(lambda: 'model="tiny-llama",replica="' in httpx.get(f"{cluster.url}/metrics").text, 5, "the page has them")
    cluster.ok("delete", "tiny-llama", "--yes")


def test_a_generative_model_returns_embeddings_with_task_embed(
    cluster: Home, tmp_path: Path, tiny_weights: Path
) -> None:
    path = tmp_path / "vectors.yml"
    path.write_text(OURS.format(weights=tiny_weights))
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(cluster.run("schema").stdout))
    cluster.ok("deploy", path)
    with OpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        embeddings = client.embeddings.create(model="vectors", input=["one", "two"])
    assert len(embeddings.data) == 2 and len(embeddings.data[0].embedding) > 8
    path.write_text(path.read_text().replace("task:", "tsk:"))
    assert "vectors.yml: models[0]: @llm: unknown option tsk='embed': did you mean task=?" in cluster.fails(
        "deploy", path
    )
    cluster.ok("delete", "vectors", "--yes")
