"""Reads Ray Serve LLM's configuration files: a Serve config (`applications:`), or the file of one model.

Nothing is ignored silently: unsupported fields are errors, and fields that change no response are ignored with a
warning. The fields are those of `ray.serve.llm.LLMConfig` in Ray 2.60.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrun.errors import AppError
from llmrun.spec import to_label

BUILDERS = ("ray.serve.llm:build_openai_app", "ray.serve.llm.builders:build_openai_app")
APPLICATIONS, MODEL_LOADING = "applications", "model_loading_config"
# Fields by name: why they are ignored, or "" if they are used.
Fields = Mapping[str, str]
SERVE_FIELDS = {
    APPLICATIONS: "",
    "proxy_location": "llmrun has its own ingress, on the head node",
    "http_options": "set the ingress address with `llmrun up --host --port`",
    "grpc_options": "the ingress speaks HTTP only",
    "logging_config": "see `llmrun logs`",
    "target_capacity": "use min_replicas and max_replicas",
}
APPLICATION_FIELDS = {
    "name": "",
    "import_path": "",
    "args": "",
    "route_prefix": "all apps share the endpoint /v1",
    "logging_config": SERVE_FIELDS["logging_config"],
    "external_scaler_enabled": "llmrun has its own autoscaler",
}
ARGS_FIELDS = {
    "llm_configs": "",
    "ingress_deployment_config": SERVE_FIELDS["proxy_location"],
    "ingress_cls_config": SERVE_FIELDS["proxy_location"],
}
DEPLOYMENT_FIELDS = {
    **{name: "llmrun checks its replicas itself" for name in ("health_check_period_s", "health_check_timeout_s")},
    **{name: "set LLMRUN_DRAIN_TIMEOUT" for name in ("graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s")},
    "logging_config": SERVE_FIELDS["logging_config"],
    "request_router_config": "the ingress routes by load, adapter and prompt prefix",
    "name": "the deployment is named after the model",
}
# The first one that is set counts.
DELAYS = ("downscale_to_zero_delay_s", "downscale_delay_s")
AUTOSCALING_FIELDS = {
    **dict.fromkeys(("min_replicas", "max_replicas", "target_ongoing_requests", *DELAYS), ""),
    **{
        name: "llmrun starts replicas as soon as requests wait"
        for name in (
            *("initial_replicas", "upscale_delay_s", "metrics_interval_s", "look_back_period_s", "upscaling_factor"),
            *("upscale_smoothing_factor", "downscale_smoothing_factor", "downscaling_factor", "smoothing_factor"),
        )
    },
}
IGNORED_ENGINE_FIELDS = {
    "tokenizer_pool_size": "vLLM no longer supports it",
    "tokenizer_pool_type": "vLLM no longer supports it",
    "disable_log_requests": "the ingress logs requests",
    "distributed_executor_backend": "llmrun starts the engine's processes itself",
}
IGNORED_VARIABLES = {"VLLM_USE_V1": "vLLM only has the V1 engine"}
LORA_FIELDS = {
    **dict.fromkeys(("dynamic_lora_loading_path", "max_num_adapters_per_replica"), ""),
    **{
        name: "adapters are downloaded like weights, with retries and a deadline"
        for name in ("download_timeout_s", "max_download_tries")
    },
}
IGNORED_MODEL_FIELDS = {"experimental_configs": "it tunes Ray's own streaming and proxies"}
TASKS = ("generate", "embed", "classify", "score")
ENGINES = {"vLLM": "vllm", "SGLang": "sglang"}
# Ray's PACK may spread over nodes what one node cannot hold; llmrun keeps an engine on one node unless told otherwise.
SPREADING = ("SPREAD", "STRICT_SPREAD")
STRATEGIES = ("PACK", "STRICT_PACK", *SPREADING)


def is_ray_config(content: Mapping[str, Any]) -> bool:
    """Return whether a file's content is a Ray Serve LLM configuration."""
    return APPLICATIONS in content or MODEL_LOADING in content


@dataclass
class RayConfigReader:
    """Reads one file; collects `warnings`.

    `load` parses a model file that this one refers to; it may raise AppError.
    """

    path: Path
    load: Callable[[Path], Any]
    warnings: list[str] = field(default_factory=list)

    def read(self, content: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the spec fields of each model. Raises AppError."""
        if MODEL_LOADING in content:
            return [self._model(content, "")]
        self._check_fields(content, SERVE_FIELDS, "")
        models: list[dict[str, Any]] = []
        for number, application in enumerate(self._list(content[APPLICATIONS], APPLICATIONS)):
            where = f"{APPLICATIONS}[{number}]"
            models += self._application(self._mapping(application, where), where)
        return models

    def _application(self, application: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        if (builder := application.get("import_path")) not in BUILDERS:
            raise self._error(f"{where}.import_path={builder!r}: must be {BUILDERS[0]}; deploy other apps with Serve")
        self._check_fields(application, APPLICATION_FIELDS, where)
        args = self._mapping(application.get("args"), f"{where}.args")
        self._check_fields(args, ARGS_FIELDS, f"{where}.args")
        models = []
        for number, config in enumerate(self._list(args.get("llm_configs"), f"{where}.args.llm_configs")):
            at = f"{where}.args.llm_configs[{number}]"
            if isinstance(config, str):  # Ray resolves it from where `serve` runs, usually the file's folder
                file = next((p for p in (self.path.parent / config, Path(config)) if p.is_file()), None)
                if file is None:
                    raise self._error(f"{at}: file not found: {config}")
                config, at = self.load(file), str(config)  # noqa: PLW2901
            models.append(self._model(self._mapping(config, at), at))
        return models

    def _model(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return one LLMConfig as spec fields. Raises AppError."""
        loading = self._mapping(config.get(MODEL_LOADING), _join(where, MODEL_LOADING))
        model_id = loading.get("model_id")
        if not isinstance(model_id, str) or not to_label(model_id):
            raise self._error(f"{_join(where, MODEL_LOADING)}.model_id={model_id!r}: a model name is required")
        name = to_label(model_id.rpartition("/")[2]) or to_label(model_id)
        engine = dict(self._mapping(config.get("engine_kwargs"), _join(where, "engine_kwargs")))
        fields: dict[str, Any] = {"name": name, "aliases": [] if model_id == name else [model_id]}
        readers = {
            "llm_engine": self._engine,
            MODEL_LOADING: self._source,
            "accelerator_type": self._accelerator,
            "accelerator_config": self._accelerator_config,
            "deployment_config": self._deployment,
            "placement_group_config": self._placement,
            "lora_config": self._lora,
            "runtime_env": self._runtime_env,
            "log_engine_metrics": self._metrics,
        }
        for key, read in readers.items():
            if config.get(key) is not None:
                read(config[key], _join(where, key), fields, engine)
        fields.setdefault("min_replicas", 1)  # Serve's default
        self._engine_kwargs(engine, _join(where, "engine_kwargs"), fields)
        self._check_fields(config, _used(*readers, "engine_kwargs") | IGNORED_MODEL_FIELDS, where)
        return fields

    def _engine(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        if value not in ENGINES:
            raise self._error(f"{where}={value!r}: must be one of {', '.join(ENGINES)}")
        fields["engine"] = ENGINES[value]

    def _source(self, value: Any, where: str, fields: dict[str, Any], engine: dict[str, Any]) -> None:
        loading = self._mapping(value, where)
        self._check_fields(loading, _used("model_id", "model_source", "tokenizer_source"), where)
        source = loading.get("model_source") or loading["model_id"]
        if isinstance(source, Mapping):
            self._check_fields(source, _used("bucket_uri"), f"{where}.model_source")
            source = source.get("bucket_uri")
        if not isinstance(source, str):
            raise self._error(f"{where}.model_source={source!r}: must be a name, a path, or bucket_uri: s3://…")
        fields["model"] = source
        if loading.get("tokenizer_source"):
            engine["tokenizer"] = loading["tokenizer_source"]

    def _accelerator(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        fields["accelerator"] = "A10G" if value == "A10" else value

    def _accelerator_config(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        kind = self._mapping(value, where).get("kind")
        if kind == "cpu":
            fields["accelerator"] = "cpu"
        elif kind != "gpu":
            raise self._error(f"{where}.kind={kind!r}: must be gpu or cpu")

    def _deployment(self, value: Any, where: str, fields: dict[str, Any], engine: dict[str, Any]) -> None:
        deployment = dict(self._mapping(value, where))
        autoscaling = deployment.pop("autoscaling_config", None)
        replicas = deployment.pop("num_replicas", None)
        if replicas not in (None, "auto"):
            fields |= {"min_replicas": replicas, "max_replicas": replicas}
        elif autoscaling is not None:
            at = f"{where}.autoscaling_config"
            self._autoscaling(self._mapping(autoscaling, at), at, fields)
        if (ongoing := deployment.pop("max_ongoing_requests", None)) is not None:
            fields["max_ongoing_requests"] = ongoing
            fields.setdefault("target_ongoing_requests", min(ongoing, 32))
        if (queued := deployment.pop("max_queued_requests", None)) not in (None, -1):
            fields["max_queued"] = queued
        actor = dict(self._mapping(deployment.pop("ray_actor_options", None), f"{where}.ray_actor_options"))
        for ray_name, name in (("num_cpus", "cpus"), ("num_gpus", "gpus"), ("accelerator_type", "accelerator")):
            if actor.get(ray_name):
                fields.setdefault(name, actor[ray_name])
            actor.pop(ray_name, None)
        if actor.get("runtime_env"):
            self._runtime_env(actor["runtime_env"], f"{where}.ray_actor_options.runtime_env", fields, engine)
        self._check_fields(actor, _used("runtime_env"), f"{where}.ray_actor_options")
        self._check_fields(deployment, DEPLOYMENT_FIELDS, where)

    def _autoscaling(self, config: Mapping[str, Any], where: str, fields: dict[str, Any]) -> None:
        least = config.get("min_replicas", 1)  # Serve's default
        fields |= {"min_replicas": least, "max_replicas": config.get("max_replicas", max(1, least))}
        if config.get("target_ongoing_requests") is not None:
            fields["target_ongoing_requests"] = round(config["target_ongoing_requests"])
        if delay := next((config[name] for name in DELAYS if config.get(name)), None):
            fields["idle_timeout"] = delay
        self._check_fields(config, AUTOSCALING_FIELDS, where)

    def _placement(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        group = self._mapping(value, where)
        self._check_fields(group, _used("bundles", "bundle_per_worker", "strategy"), where)
        strategy = group.get("strategy", "PACK")
        bundles = group.get("bundles") or ([group["bundle_per_worker"]] if group.get("bundle_per_worker") else [])
        if strategy not in STRATEGIES:
            raise self._error(f"{where}.strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}")
        for number, bundle in enumerate(bundles):
            at = f"{where}.bundles[{number}]"
            self._check_fields(self._mapping(bundle, at), _used("CPU", "GPU"), at)
        cpus, gpus = (sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU"))
        nodes = len(bundles) if strategy in SPREADING else 1
        if nodes > 1:
            if any(bundle != bundles[0] for bundle in bundles):
                raise self._error(f"{where}.bundles: must be the same for each node of an engine")
            fields["nodes"] = nodes
        if cpus:
            fields["cpus"] = cpus / nodes
        if gpus and group.get("bundles"):
            fields["gpus"] = gpus

    def _lora(self, value: Any, where: str, fields: dict[str, Any], engine: dict[str, Any]) -> None:
        config = self._mapping(value, where)
        self._check_fields(config, LORA_FIELDS, where)
        if not config.get("dynamic_lora_loading_path"):
            raise self._error(f"{where}.dynamic_lora_loading_path is required: the location of the adapters")
        lora: dict[str, Any] = {"path": config["dynamic_lora_loading_path"]}
        if (max_loaded := config.get("max_num_adapters_per_replica") or engine.get("max_loras")) is not None:
            lora["max_loaded"] = max_loaded
        if engine.get("max_lora_rank") is not None:
            lora["max_rank"] = engine["max_lora_rank"]
        fields["lora"] = lora

    def _runtime_env(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        env = self._mapping(value, where)
        for name in env:
            if name != "env_vars":
                raise self._error(f"{where}.{name}: not supported; engines use their node's packages. Remove it.")
        variables = self._mapping(env.get("env_vars"), f"{where}.env_vars")
        ignored = [name for name in variables if name in IGNORED_VARIABLES]
        self._check_fields(ignored, IGNORED_VARIABLES, f"{where}.env_vars")
        used = {str(name): str(text) for name, text in variables.items() if name not in IGNORED_VARIABLES}
        fields["env"] = fields.get("env", {}) | used

    def _metrics(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        fields["log_engine_metrics"] = value

    def _engine_kwargs(self, engine: dict[str, Any], where: str, fields: dict[str, Any]) -> None:
        """Set the engine's arguments, without those that are fields of the spec. Raises AppError."""
        for name in ("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank"):
            if engine.pop(name, None) and "lora" not in fields:
                raise self._error(f"{where}.{name}: lora_config is required, with the location of the adapters")
        if (task := engine.pop("task", None)) is not None:
            if task not in TASKS:
                raise self._error(f"{where}.task={task!r}: must be one of {', '.join(TASKS)}")
            fields["task"] = task
        ignored = [name for name in engine if name in IGNORED_ENGINE_FIELDS]
        self._check_fields(ignored, IGNORED_ENGINE_FIELDS, where)
        fields["engine_args"] = {name: value for name, value in engine.items() if name not in ignored}

    def _check_fields(self, names: Iterable[str], supported: Fields, where: str) -> None:
        """Warn about ignored fields. Raises AppError for unsupported ones."""
        for name in names:
            if name not in supported:
                raise self._error(f"{_join(where, name)}: not supported; remove it")
            if reason := supported[name]:
                self.warnings.append(f"{_join(where, name)} is ignored: {reason}")

    def _mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self._error(f"{where}: must be a mapping, not {value!r}")
        return value

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self._error(f"{where}: must be a non-empty list")
        return value

    def _error(self, text: str) -> AppError:
        return AppError(f"{self.path}: {text}")


def _used(*names: str) -> dict[str, str]:
    """Return fields that are all used."""
    return dict.fromkeys(names, "")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
