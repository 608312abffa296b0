"""From classes with `@llm`, specs, or the arguments of a `serve` config to Serve applications."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_NAMESPACE

from llmrun.app_file import is_loading
from llmrun.errors import SpecError
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun.standalone import lost_alone
from llmrun_runtime.builders.ingress import OpenAIIngress
from llmrun_runtime.builders.read_model import Model, read_model
from llmrun_runtime.builders.server import LLMServer
from llmrun_runtime.control.autoscaling.serve_config import HEALTH_CHECK_S, actor_options
from llmrun_runtime.placement import Placement, resolve
from llmrun_runtime.ray_nodes import cluster_nodes

log = logging.getLogger("ray.serve")
# A model at zero comes when somebody asks; as Serve has it by itself, it hears of that up to ten seconds later.
SCALER = {"upscale_delay_s": 0, "metrics_interval_s": 1, "look_back_period_s": 2}


def build_openai_app(models: Sequence[Model] | Mapping[str, Any]) -> serve.Application:
    """One application of all these models behind OpenAI's API, for `serve.run`.

    Models are classes with `@llm`, specs, or mappings of a spec's fields; or all of them as `{"models": […]}`, the
    `args` of a `serve` config. Raises LLMRunError.
    """
    found = models.get("models") if isinstance(models, Mapping) else models
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise SpecError("build_openai_app: a list of classes with @llm, or {'models': […]}")
    names: dict[str, str] = {}
    checked = [read_model(model) for model in found]  # all of them, before anything starts
    for spec, _ in checked:
        for name in spec.served_names:
            if name in names:
                raise SpecError(
                    f"{spec.name}: the name {name!r} belongs to {names[name]}: choose another name= or alias"
                )
            names[name] = spec.name
    # Serve's arguments are named as Python's are.
    applications = {spec.name.replace("-", "_"): _deployment(spec, file) for spec, file in checked}
    limits = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(OpenAIIngress).options(name="ingress", **limits).bind(names, **applications)


def build_llm_deployment(model: Model) -> serve.Application:
    """A deployment of one model, to be bound to an ingress or to a deployment of yours. Raises LLMRunError."""
    return _deployment(*read_model(model))


def _deployment(spec: ModelSpec, file: str) -> serve.Application:
    if lost := lost_alone(spec):
        log.warning("%s", lost)
    scaling = {
        "min_replicas": spec.min_replicas,
        "max_replicas": spec.max_replicas,
        "initial_replicas": max(1, spec.min_replicas),  # it shows at once whether the engine starts
        "target_ongoing_requests": spec.target_ongoing_requests,
        "downscale_delay_s": spec.idle_timeout,
        **SCALER,
    }
    deployment = serve.deployment(LLMServer).options(
        name=spec.name,
        autoscaling_config=scaling,
        max_ongoing_requests=spec.max_ongoing_requests,
        max_queued_requests=spec.max_queued,
        ray_actor_options=actor_options(_place(spec)),
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=Settings().drain_timeout,
    )
    return deployment.bind(spec.model_dump(mode="json"), file)


def _place(spec: ModelSpec) -> Placement:
    """What a replica takes. Starts a Ray if there is none, as `serve.run` would in a moment. Raises LLMRunError."""
    if is_loading():
        return Placement(spec.cpus, 0)  # the application is only described: whoever serves it builds it again
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here reports to nobody
        ray.init(namespace=SERVE_NAMESPACE)
    return resolve(spec, cluster_nodes())
