"""Ray Serve LLM's own configuration files, as llmrun's models: a `serve` config, or the file of one model.

Nothing that such a file says is ignored in silence: what has no meaning here is refused by name, or warned about where
leaving it out changes no answer. Fields: `ray.serve.llm.LLMConfig` of Ray 2.60.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrun.errors import AppError
from llmrun.spec import to_label

BUILDERS = ("ray.serve.llm:build_openai_app", "ray.serve.llm.builders:build_openai_app")
APPLICATIONS, ONE = "applications", "model_loading_config"
# Serve's own machinery: llmrun's ingress, scaler and logs stand in its place.
OF_SERVE = {
    "proxy_location": "llmrun has an ingress of its own, on the head",
    "http_options": "`llmrun up --host --port` says where the ingress listens",
    "grpc_options": "the ingress speaks HTTP",
    "logging_config": "`llmrun logs` has the logs",
    "target_capacity": "min_replicas and max_replicas say it",
}
OF_APPLICATION = {
    "name": "",
    "import_path": "",
    "args": "",
    "route_prefix": "the endpoint is /v1, shared by all apps",
    "logging_config": OF_SERVE["logging_config"],
    "external_scaler_enabled": "llmrun scales its models itself",
}
OF_ARGS = {
    "llm_configs": "",
    "ingress_deployment_config": OF_SERVE["proxy_location"],
    "ingress_cls_config": OF_SERVE["proxy_location"],
}
OF_DEPLOYMENT = {
    **{name: "llmrun looks after its replicas itself" for name in ("health_check_period_s", "health_check_timeout_s")},
    **{
        name: "LLMRUN_DRAIN_TIMEOUT says it"
        for name in ("graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s")
    },
    "logging_config": OF_SERVE["logging_config"],
    "request_router_config": "the ingress routes by load, adapters and how prompts begin",
    "name": "the model's name is said once",
}
OF_SCALER = {
    name: "llmrun starts replicas when requests wait, at once"
    for name in (
        *("initial_replicas", "upscale_delay_s", "metrics_interval_s", "look_back_period_s", "upscaling_factor"),
        *("upscale_smoothing_factor", "downscale_smoothing_factor", "downscaling_factor", "smoothing_factor"),
    )
}
OF_ENGINE = {
    "tokenizer_pool_size": "vLLM has it no more",
    "tokenizer_pool_type": "vLLM has it no more",
    "disable_log_requests": "requests are logged by the ingress",
    "distributed_executor_backend": "llmrun starts the engine's processes itself",
}
OF_ENVIRONMENT = {"VLLM_USE_V1": "vLLM has one engine only, its V1"}
OF_LORA = {
    name: "adapters are brought like weights, with retries and a deadline"
    for name in ("download_timeout_s", "max_download_tries")
}
# The first that is said counts.
DELAYS = ("downscale_to_zero_delay_s", "downscale_delay_s")
TASKS = ("generate", "embed", "classify", "score")
ENGINES = {"vLLM": "vllm", "SGLang": "sglang"}
# Ray's PACK may spread what does not fit; here an engine is on one node unless it says otherwise.
SPREADING = ("SPREAD", "STRICT_SPREAD")
STRATEGIES = ("PACK", "STRICT_PACK", *SPREADING)


def is_rays(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is Ray's."""
    return APPLICATIONS in content or ONE in content


@dataclass
class Reader:
    """Reads one file. `load`: a model's file that it names; raises AppError. `warnings` come about."""

    path: Path
    load: Callable[[Path], Any]
    warnings: list[str] = field(default_factory=list)

    def read(self, content: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The fields of each model's spec. Raises AppError."""
        if ONE in content:
            return [self.model(content, "")]
        self._leave_out(content, {**OF_SERVE, APPLICATIONS: ""}, "")
        found: list[dict[str, Any]] = []
        for number, application in enumerate(_list(content[APPLICATIONS], APPLICATIONS, self._wrong)):
            where = f"{APPLICATIONS}[{number}]"
            found += self._application(self._mapping(application, where), where)
        return found

    def _application(self, application: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        if (builder := application.get("import_path")) not in BUILDERS:
            raise self._wrong(
                f"{where}.import_path={builder!r}: only {BUILDERS[0]} makes models; deploy others with Serve"
            )
        self._leave_out(application, OF_APPLICATION, where)
        args = self._mapping(application.get("args"), f"{where}.args")
        self._leave_out(args, OF_ARGS, f"{where}.args")
        found = []
        for number, config in enumerate(_list(args.get("llm_configs"), f"{where}.args.llm_configs", self._wrong)):
            at = f"{where}.args.llm_configs[{number}]"
            if isinstance(config, str):  # Ray reads it from where `serve` runs; mostly that is where the file is
                place = next((p for p in (self.path.parent / config, Path(config)) if p.is_file()), None)
                if place is None:
                    raise self._wrong(f"{at}: there is no file {config}")
                config, at = self.load(place), str(config)  # noqa: PLW2901
            found.append(self.model(self._mapping(config, at), at))
        return found

    def model(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """One LLMConfig as fields of a spec. Raises AppError."""
        loading = self._mapping(config.get(ONE), _under(where, ONE))
        said = loading.get("model_id")
        if not isinstance(said, str) or not to_label(said):
            raise self._wrong(f"{_under(where, ONE)}.model_id={said!r}: name the model")
        name = to_label(said.rpartition("/")[2]) or to_label(said)
        engine = dict(self._mapping(config.get("engine_kwargs"), _under(where, "engine_kwargs")))
        fields: dict[str, Any] = {"name": name, "aliases": [] if said == name else [said]}
        parts = {
            "llm_engine": self._engine,
            ONE: self._source,
            "accelerator_type": self._accelerator,
            "accelerator_config": self._accelerator_config,
            "deployment_config": self._deployment,
            "placement_group_config": self._placement,
            "lora_config": self._lora,
            "runtime_env": self._runtime_env,
            "log_engine_metrics": self._metrics,
        }
        for part, read in parts.items():
            if config.get(part) is not None:
                read(config[part], _under(where, part), fields, engine)
        fields.setdefault("min_replicas", 1)  # Serve keeps one if nothing is said
        self._engine_kwargs(engine, _under(where, "engine_kwargs"), fields)
        experimental = {"experimental_configs": "it tunes Ray's own streaming and proxies"}
        self._leave_out(config, dict.fromkeys((*parts, "engine_kwargs"), "") | experimental, where)
        return fields

    def _engine(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        if value not in ENGINES:
            raise self._wrong(f"{where}={value!r}: one of {', '.join(ENGINES)}")
        fields["engine"] = ENGINES[value]

    def _source(self, value: Any, where: str, fields: dict[str, Any], engine: dict[str, Any]) -> None:
        loading = self._mapping(value, where)
        self._leave_out(loading, dict.fromkeys(("model_id", "model_source", "tokenizer_source"), ""), where)
        source = loading.get("model_source") or loading["model_id"]
        if isinstance(source, Mapping):
            self._leave_out(source, {"bucket_uri": ""}, f"{where}.model_source")
            source = source.get("bucket_uri")
        if not isinstance(source, str):
            raise self._wrong(f"{where}.model_source={source!r}: a name, a path, or bucket_uri: s3://…")
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
            raise self._wrong(f"{where}.kind={kind!r}: gpu or cpu")

    def _deployment(self, value: Any, where: str, fields: dict[str, Any], engine: dict[str, Any]) -> None:
        deployment = dict(self._mapping(value, where))
        scaling = deployment.pop("autoscaling_config", None)
        number = deployment.pop("num_replicas", None)
        if number not in (None, "auto"):
            fields |= {"min_replicas": number, "max_replicas": number}
        elif scaling is not None:
            self._scaling(self._mapping(scaling, f"{where}.autoscaling_config"), f"{where}.autoscaling_config", fields)
        if (most := deployment.pop("max_ongoing_requests", None)) is not None:
            fields["max_ongoing_requests"] = most
            fields.setdefault("target_ongoing_requests", min(most, 32))
        if (queued := deployment.pop("max_queued_requests", None)) not in (None, -1):
            fields["max_queued"] = queued
        actor = dict(self._mapping(deployment.pop("ray_actor_options", None), f"{where}.ray_actor_options"))
        for theirs, ours in (("num_cpus", "cpus"), ("num_gpus", "gpus"), ("accelerator_type", "accelerator")):
            if actor.get(theirs):
                fields.setdefault(ours, actor[theirs])
            actor.pop(theirs, None)
        if actor.get("runtime_env"):
            self._runtime_env(actor["runtime_env"], f"{where}.ray_actor_options.runtime_env", fields, engine)
        self._leave_out(actor, {"runtime_env": ""}, f"{where}.ray_actor_options")
        self._leave_out(deployment, OF_DEPLOYMENT, where)

    def _scaling(self, scaling: Mapping[str, Any], where: str, fields: dict[str, Any]) -> None:
        least = scaling.get("min_replicas", 1)  # Serve's own default
        fields |= {"min_replicas": least, "max_replicas": scaling.get("max_replicas", max(1, least))}
        if scaling.get("target_ongoing_requests") is not None:
            fields["target_ongoing_requests"] = round(scaling["target_ongoing_requests"])
        delays = [scaling.get(name) for name in DELAYS]
        if said := next((delay for delay in delays if delay), None):
            fields["idle_timeout"] = said
        known = ("min_replicas", "max_replicas", "target_ongoing_requests", *DELAYS)
        self._leave_out(scaling, dict.fromkeys(known, "") | OF_SCALER, where)

    def _placement(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        group = self._mapping(value, where)
        self._leave_out(group, dict.fromkeys(("bundles", "bundle_per_worker", "strategy"), ""), where)
        strategy = group.get("strategy", "PACK")
        bundles = group.get("bundles") or ([group["bundle_per_worker"]] if group.get("bundle_per_worker") else [])
        if strategy not in STRATEGIES:
            raise self._wrong(f"{where}.strategy={strategy!r}: one of {', '.join(STRATEGIES)}")
        for number, bundle in enumerate(bundles):
            self._leave_out(self._mapping(bundle, where), {"CPU": "", "GPU": ""}, f"{where}.bundles[{number}]")
        cpus, gpus = (sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU"))
        nodes = len(bundles) if strategy in SPREADING else 1
        if nodes > 1:
            if any(bundle != bundles[0] for bundle in bundles):
                raise self._wrong(f"{where}.bundles: an engine has the same on each of its nodes")
            fields["nodes"] = nodes
        if cpus:
            fields["cpus"] = cpus / nodes
        if gpus and group.get("bundles"):
            fields["gpus"] = gpus

    def _lora(self, value: Any, where: str, fields: dict[str, Any], engine: dict[str, Any]) -> None:
        lora = self._mapping(value, where)
        self._leave_out(
            lora, dict.fromkeys(("dynamic_lora_loading_path", "max_num_adapters_per_replica"), "") | OF_LORA, where
        )
        if not lora.get("dynamic_lora_loading_path"):
            raise self._wrong(f"{where}.dynamic_lora_loading_path: say where adapters lie")
        said: dict[str, Any] = {"path": lora["dynamic_lora_loading_path"]}
        if (held := lora.get("max_num_adapters_per_replica") or engine.get("max_loras")) is not None:
            said["max_loaded"] = held
        if engine.get("max_lora_rank") is not None:
            said["max_rank"] = engine["max_lora_rank"]
        fields["lora"] = said

    def _runtime_env(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        env = self._mapping(value, where)
        for name in env:
            if name != "env_vars":
                raise self._wrong(f"{where}.{name}: the engine's packages are those of the node: leave it out")
        said = self._mapping(env.get("env_vars"), f"{where}.env_vars")
        self._leave_out(
            {name: said[name] for name in said if name in OF_ENVIRONMENT}, OF_ENVIRONMENT, f"{where}.env_vars"
        )
        kept = {str(name): str(value) for name, value in said.items() if name not in OF_ENVIRONMENT}
        fields["env"] = fields.get("env", {}) | kept

    def _metrics(self, value: Any, where: str, fields: dict[str, Any], _: dict[str, Any]) -> None:
        fields["log_engine_metrics"] = value

    def _engine_kwargs(self, engine: dict[str, Any], where: str, fields: dict[str, Any]) -> None:
        """What vLLM gets, less what says the same elsewhere."""
        for name in ("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank"):
            if engine.pop(name, None) and "lora" not in fields:
                raise self._wrong(f"{where}.{name}: lora_config says where adapters lie")
        if (task := engine.pop("task", None)) is not None:
            if task not in TASKS:
                raise self._wrong(f"{where}.task={task!r}: one of {', '.join(TASKS)}")
            fields["task"] = task
        self._leave_out({name: engine.pop(name) for name in list(engine) if name in OF_ENGINE}, OF_ENGINE, where)
        fields["engine_args"] = engine

    def _leave_out(self, given: Mapping[str, Any], known: Mapping[str, str], where: str) -> None:
        """Warn of what has a reason in `known`; refuse what is not there. Raises AppError."""
        for name in given:
            if name not in known:
                raise self._wrong(f"{_under(where, name)}: it has no meaning here: leave it out")
            if known[name]:
                self.warnings.append(f"{_under(where, name)} is left out: {known[name]}")

    def _mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self._wrong(f"{where}: names and values, not {value!r}")
        return value

    def _wrong(self, text: str) -> AppError:
        return AppError(f"{self.path}: {text}")


def _under(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _list(value: Any, where: str, wrong: Callable[[str], AppError]) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise wrong(f"{where}: a list of at least one")
    return value
