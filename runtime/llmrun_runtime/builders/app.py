"""Builds Serve applications from classes with `@llm`, from specs, or from the `args` of a `serve` config."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve

from llmrun.app_file import is_loading
from llmrun.errors import SpecError
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun_runtime import ray_internals
from llmrun_runtime.builders.ingress import OpenAIIngress
from llmrun_runtime.builders.read_model import Model, read_model
from llmrun_runtime.builders.server import LLMServer
from llmrun_runtime.placement import Placement, resolve
from llmrun_runtime.ray_nodes import cluster_nodes
from llmrun_runtime.replica.deployment import HEALTH_CHECK_S

# A model at zero replicas starts at its first request; by Serve's defaults it would start up to 10 s later.
FAST_UPSCALE = {"upscale_delay_s": 0, "metrics_interval_s": 1, "look_back_period_s": 2}


def build_openai_app(models: Sequence[Model] | Mapping[str, Any]) -> serve.Application:
    """Build one application that serves all these models through OpenAI's API, for `serve.run`.

    `models`: classes with `@llm`, specs, or mappings of a spec's fields; or `{"models": […]}`, the `args` of a `serve`
    config. Raises LLMRunError.
    """
    items = models.get("models") if isinstance(models, Mapping) else models
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise SpecError("build_openai_app: models must be a list of classes with @llm, or {'models': […]}")
    names: dict[str, str] = {}
    checked = [read_model(model) for model in items]  # check all models before anything starts
    for spec, _ in checked:
        for name in spec.served_names:
            if name in names:
                raise SpecError(f"{spec.name}: name {name!r} is used by {names[name]}: choose another name= or alias")
            names[name] = spec.name
    # Serve passes these as keyword arguments, so names must be Python identifiers.
    applications = {spec.name.replace("-", "_"): _deployment(spec, file) for spec, file in checked}
    limits = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(OpenAIIngress).options(name="ingress", **limits).bind(names, **applications)


def build_llm_deployment(model: Model) -> serve.Application:
    """Build a deployment of one model, to bind to an ingress or to your own deployment. Raises LLMRunError."""
    return _deployment(*read_model(model))


def _deployment(spec: ModelSpec, file: str) -> serve.Application:
    scaling = {
        "min_replicas": spec.min_replicas,
        "max_replicas": spec.max_replicas,
        "initial_replicas": max(1, spec.min_replicas),  # shows at once whether the engine starts
        "target_ongoing_requests": spec.target_ongoing_requests,
        "downscale_delay_s": spec.idle_timeout,
        **FAST_UPSCALE,
    }
    deployment = serve.deployment(LLMServer).options(
        name=spec.name,
        autoscaling_config=scaling,
        max_ongoing_requests=spec.max_ongoing_requests,
        max_queued_requests=spec.max_queued,
        ray_actor_options=_placement(spec).actor_options(),
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=Settings().drain_timeout,
    )
    return deployment.bind(spec.model_dump(mode="json"), file)


def _placement(spec: ModelSpec) -> Placement:
    """The resources of a replica. Starts Ray if it is not running, as `serve.run` would. Raises LLMRunError."""
    if is_loading():
        return Placement(
            spec.reserved_cpus, 0
        )  # the app file is only inspected; `serve run` builds the application again
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray started here sends no usage reports
        ray.init(namespace=ray_internals.serve_namespace())
    return resolve(spec, cluster_nodes())
