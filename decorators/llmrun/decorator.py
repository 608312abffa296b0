"""`@llm`: turns a class into a model's definition, and refuses a wrong one at once.

Knows nothing of clusters, files or the command line.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import JsonValue, ValidationError

from llmrun.errors import SpecError
from llmrun.lora import LoRA
from llmrun.spec import ModelSpec, Secret, to_label
from llmrun.weights import Weights

T = TypeVar("T", bound=type)
HOOKS = {"on_start": ("self",), "on_request": ("self", "request")}
ATTRIBUTE = "__llmrun_spec__"


def llm(
    model: str | Weights = "",
    *,
    name: str | None = None,
    aliases: Sequence[str] = (),
    accelerator: str | Sequence[str] | None = None,
    gpus: float | None = None,
    nodes: int = 1,
    cpus: float = 1,
    lora: LoRA | Weights | str | Mapping[str, Weights | str] | None = None,
    min_replicas: int = 0,
    max_replicas: int = 1,
    idle_timeout: float = 300,
    schedule: str | Sequence[str] | None = None,
    min_uptime: float = 60,
    evictable: bool = True,
    target_ongoing_requests: int = 32,
    max_ongoing_requests: int = 256,
    max_queued: int = 1000,
    rpm: int = 0,
    tpm: int = 0,
    max_in_flight: int = 0,
    cold_start: str = "default",
    task: str = "auto",
    log_engine_metrics: bool = True,
    engine: str = "vllm",
    engine_args: Mapping[str, JsonValue] | Sequence[str] | str = "",
    env: Mapping[str, str | Secret] | None = None,
    requirements: Sequence[str] = (),
    **unknown: Any,
) -> Callable[[T], T]:
    """Serve `model` under the class's name in kebab-case. `@llm("org/model")` alone is enough.

    Args:
        model: `org/name` or `org/name@revision` on Hugging Face, an address like `s3://bucket/path` or
            `gs://bucket/path`, or a path (`/…`, `./…` from the app file's folder, `~…`, `file://…`); `Weights(…)` adds
            options to one.
        name: the public name, a DNS label; by default the class's name in kebab-case.
        aliases: further names that clients may ask for. All names are unique on a cluster.
        accelerator: None: one GPU of any kind if the cluster has any, else CPU. `"cpu"`; `"A10G"`; `"A10G:2"`
            (two for each replica); `["H100", "A100"]` (the first that the cluster has).
        gpus: GPUs for each replica, on all its nodes together; by default 1, or what the engine's parallel sizes want.
            A part of one (0.5) leaves the rest of that GPU to others.
        nodes: nodes that each replica spans, with the same number of GPUs on each; every other replica is on one node.
        cpus: CPU cores that each replica reserves.
        lora: where adapters lie, a folder for each, or their places by name; each is served as `model:adapter`.
            `LoRA(…)` says more.
        min_replicas: replicas that stay when nobody asks. 0 frees everything.
        max_replicas: replicas at most.
        idle_timeout: seconds without a request after which replicas above `min_replicas` end.
        schedule: when one replica stays though nobody asks: `"Mon-Fri 08:00-18:00 Europe/Berlin"`, or a list of such.
        min_uptime: seconds for which a replica is safe from having to make room for another model's.
        evictable: whether replicas that nobody asks ever make room for another model's.
        target_ongoing_requests: requests in flight per replica above which another replica starts.
        max_ongoing_requests: requests in flight per replica at most; more wait in the ingress.
        max_queued: requests that wait at most, while there is no replica with room; the rest get 429.
        rpm: requests a minute, of all callers together; the rest get 429. 0 is no limit; keys can have limits of their
            own (`llmrun key create`).
        tpm: tokens a minute, of prompts and answers together.
        max_in_flight: requests that wait or are answered at once.
        cold_start: `"fast"` trims what a GPU engine prepares at its start (CUDA graphs), for some speed under load.
        task: what the model is for: `"generate"`, `"embed"`, `"classify"` or `"score"`; by default what it is made for.
        log_engine_metrics: whether the engines' own metrics are among those at `/metrics`.
        engine: the engine's name.
        engine_args: the engine's arguments: `{"max_model_len": 8192}`, or pasted flags, `"--max-model-len 8192"`.
        env: variables for the engine. `Secret("NAME")` is read on the node.
        requirements: packages (PEP 508) for the class's own code, beside the engine's.

    Raises:
        SpecError: an argument is wrong; the message names it, its value and the fix.
    """
    if isinstance(model, type):
        raise SpecError(f'@llm on {model.__name__} needs a model: write @llm("org/model")')
    known = [p for p in inspect.signature(llm).parameters if p != "unknown"]
    for key, value in unknown.items():
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}=?" if near else "known are " + ", ".join(known)
        raise SpecError(f"@llm does not know {key}={value!r}: {hint}")
    if not isinstance(model, Weights) and (not isinstance(model, str) or not model.strip()):
        raise SpecError(f'model={model!r}: name the weights, like @llm("org/model") or @llm("./folder")')

    def decorate(cls: T) -> T:
        if not isinstance(cls, type):
            raise SpecError(f"@llm goes on a class, not on {cls!r}: write `class Assistant: ...` under it")
        _check_hooks(cls)
        fields: dict[str, Any] = {
            "model": model,
            "name": to_label(cls.__name__) if name is None else name,
            "aliases": aliases,
            "accelerator": accelerator,
            "gpus": gpus,
            "nodes": nodes,
            "cpus": cpus,
            "lora": lora,
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "idle_timeout": idle_timeout,
            "target_ongoing_requests": target_ongoing_requests,
            "max_ongoing_requests": max_ongoing_requests,
            "schedule": schedule,
            "min_uptime": min_uptime,
            "evictable": evictable,
            "max_queued": max_queued,
            "rpm": rpm,
            "tpm": tpm,
            "max_in_flight": max_in_flight,
            "cold_start": cold_start,
            "task": task,
            "log_engine_metrics": log_engine_metrics,
            "engine": engine,
            "engine_args": engine_args,
            "env": {} if env is None else env,
            "requirements": requirements,
        }
        setattr(cls, ATTRIBUTE, build_spec(fields))
        if not hasattr(cls, "deploy"):
            cls.deploy = classmethod(_deploy)  # type: ignore[attr-defined]
        return cls

    return decorate


def _deploy(cls: type) -> Any:
    """Deploy this model, as `llmrun deploy FILE::Class --yes` does; its `model` and `url`. Raises LLMRunError."""
    # By name, when it is called: who only describes models needs no command line.
    return importlib.import_module("llmrun_cli.deploy_class").deploy_class(cls)


def build_spec(fields: Mapping[str, Any]) -> ModelSpec:
    """Validate `fields`. Raises SpecError with the first thing that is wrong, in one line."""
    try:
        return ModelSpec.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ValueError):
            raise SpecError(str(cause)) from None
        where = ".".join(str(part) for part in first["loc"][:1])
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise SpecError(f"{where}={fields.get(where)!r}: {message}") from None


def spec_of(cls: type) -> ModelSpec | None:
    """The spec that `@llm` put on this very class (not on one that it inherits from)."""
    spec = vars(cls).get(ATTRIBUTE)
    return spec if isinstance(spec, ModelSpec) else None


def hooks_of(cls: type) -> tuple[str, ...]:
    """The hooks that the class has."""
    return tuple(hook for hook in HOOKS if callable(getattr(cls, hook, None)))


def _check_hooks(cls: type) -> None:
    for hook in hooks_of(cls):
        wanted = HOOKS[hook]
        try:
            inspect.signature(getattr(cls, hook)).bind(*wanted)
        except TypeError:
            kinds = {"on_start": "", "on_request": " -> dict"}
            raise SpecError(
                f"{cls.__name__}.{hook} must take ({', '.join(wanted)}): "
                f"write `def {hook}({', '.join(wanted)}){kinds[hook]}: ...`"
            ) from None
