"""From classes with `@llm`, specs, or the arguments of a `serve` config to Serve applications."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_NAMESPACE

from llmrun.decorator import build_spec, hooks_of, spec_of
from llmrun.errors import SpecError
from llmrun.loading import absolute
from llmrun.settings import Settings
from llmrun.spec import Code, ModelSpec
from llmrun_runtime.builders.ingress import OpenAIIngress
from llmrun_runtime.builders.server import LLMServer
from llmrun_runtime.control.placing import resolve
from llmrun_runtime.control.serving import cluster_nodes
from llmrun_runtime.engines.kinds import get_engine
from llmrun_runtime.serveconfig import actor_options

log = logging.getLogger("ray.serve")
Model = type | ModelSpec | Mapping[str, Any]
APP_FILE, CLASS = "app_file", "cls"
# What control and llmrun's ingress do, and nobody does here.
OF_CONTROL = ("schedule", "min_uptime", "evictable", "rpm", "tpm", "max_in_flight")
# So that a model at zero comes when somebody asks.
SCALER = {"upscale_delay_s": 0, "look_back_period_s": 2}


def build_openai_app(models: Sequence[Model] | Mapping[str, Any]) -> serve.Application:
    """One application of all these models behind OpenAI's API, for `serve.run`.

    Models are classes with `@llm`, specs, or mappings of a spec's fields; or all of them as `{"models": […]}`, the
    `args` of a `serve` config. Raises LLMRunError.
    """
    found = models.get("models") if isinstance(models, Mapping) else models
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise SpecError("build_openai_app: a list of classes with @llm, or {'models': […]}")
    names: dict[str, str] = {}
    checked = [_checked(model) for model in found]  # all of them, before anything starts
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
    return _deployment(*_checked(model))


def _deployment(spec: ModelSpec, file: str) -> serve.Application:
    if without := without_effect(spec):
        log.warning("%s: %s= does nothing without control: `llmrun deploy`", spec.name, "=, ".join(without))
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here reports to nobody
        ray.init(namespace=SERVE_NAMESPACE)  # as `serve.run` would in a moment
    placement = resolve(spec, cluster_nodes())
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
        ray_actor_options=actor_options(placement),
        health_check_period_s=5,
        graceful_shutdown_timeout_s=Settings().drain_timeout,
    )
    return deployment.bind(spec.model_dump(mode="json"), file)


def without_effect(spec: ModelSpec) -> list[str]:
    """What was said of a model that only control or llmrun's ingress do."""
    return [name for name in OF_CONTROL if getattr(spec, name) != ModelSpec.model_fields[name].default]


def _read(model: Model) -> tuple[ModelSpec, str]:
    """The spec, and the file of its class if that has code to run beside the engine. Raises SpecError."""
    if isinstance(model, ModelSpec):
        return model, ""
    if isinstance(model, type):
        spec, hooks = spec_of(model), hooks_of(model)
        if not spec:
            raise SpecError(f"{model.__name__} is no model: put @llm on it")
        file = Path(inspect.getfile(model)).absolute()
        return _with_code(absolute(spec, file.parent), str(file), model.__qualname__, hooks)
    if isinstance(model, Mapping):
        fields = dict(model)
        file, cls, hooks = fields.pop(APP_FILE, ""), fields.pop(CLASS, ""), tuple(fields.pop("hooks", ()))
        return _with_code(build_spec(fields), file, cls, hooks)
    raise SpecError(f"{model!r} is no model: a class with @llm, a spec, or its fields")


def _with_code(spec: ModelSpec, file: str, cls: str, hooks: tuple[str, ...]) -> tuple[ModelSpec, str]:
    if not hooks:
        return spec, ""
    code = Code(package="", file=Path(file).name, cls=cls, hooks=hooks)
    return spec.model_copy(update={"code": code}), file


def _checked(model: Model) -> tuple[ModelSpec, str]:
    """As `_read`. Raises SpecError for what cannot be without control, too."""
    spec, file = _read(model)
    if spec.lora:
        raise SpecError(f"{spec.name}: lora= needs control, which lists and brings adapters: `llmrun deploy`")
    if spec.nodes > 1:
        raise SpecError(f"{spec.name}: nodes= needs control: `llmrun deploy`")
    if why := get_engine(spec.engine).refuses(spec):
        raise SpecError(f"{spec.name}: {why}")
    return spec, file
