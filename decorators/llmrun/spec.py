"""The spec: the frozen, validated description of a model, JSON on the wire, hashed for diffs.

Knows what can be said of a model without a cluster; does not know which accelerators exist.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_validator, model_validator

from llmrun.errors import SpecError
from llmrun.lora import LoRA, as_lora
from llmrun.schedule import parse_window
from llmrun.weights import AnyWeights

# RFC 1123: a DNS label, so that a name can be a host name, a metric label and an application's name.
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# What clients may ask for: a Hub name or a label. Spaces, quotes and control characters never.
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPTIMIZATION = re.compile(r"^-O(?=\d)")  # vLLM's -O3

# llmrun passes these to the engine itself.
OWN_ENGINE_ARGS = {
    "model": "say it as the first argument of @llm",
    "model_tag": "say it as the first argument of @llm",
    "served_model_name": "use name= and aliases=",
    "host": "the replica chooses it",
    "port": "the replica chooses it",
    "uds": "the replica chooses its address",
    "api_key": "each replica has a secret token of its own",
    "middleware": "use on_request in the class",
    "ssl_keyfile": "put TLS in front of the ingress",
    "ssl_certfile": "put TLS in front of the ingress",
    "enable_lora": "use lora=",
    "lora_modules": "use lora=",
    "max_loras": "use lora=LoRA(…, max_loaded=)",
    "max_cpu_loras": "use lora=LoRA(…, max_loaded=)",
    "max_lora_rank": "use lora=LoRA(…, max_rank=)",
    "api_server_count": "raise max_replicas instead",
    **{
        name: "use nodes=: the replica starts every member of an engine"
        for name in ("headless", "nnodes", "node_rank", "master_addr", "master_port")
    },
}
SHORT_FLAGS = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "n": "nnodes",
    "r": "node_rank",
    "q": "quantization",
    "cc": "compilation_config",
    "O": "optimization_level",
}
# A replica's GPUs are the product of these.
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
# What changes without a restart: the scaler and the ingress use these, the engine does not.
SOFT_FIELDS = frozenset(
    {
        *("min_replicas", "max_replicas", "idle_timeout", "schedule", "min_uptime", "evictable"),
        *("target_ongoing_requests", "max_ongoing_requests", "max_queued"),
        *("rpm", "tpm", "max_in_flight", "log_engine_metrics"),
    }
)
# Of lora=, an engine knows how many adapters it holds, not which there are.
SOFT: dict[str, Any] = {**dict.fromkeys(SOFT_FIELDS, True), "lora": {"path", "adapters", "refresh"}}


class Secret(BaseModel):
    """A variable of the node's own environment, read where the engine starts, never stored or shown.

    `env={"HF_TOKEN": Secret("HF_TOKEN")}` gives the engine the node's `HF_TOKEN`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    secret: str

    def __init__(self, secret: str) -> None:
        if not isinstance(secret, str) or not VARIABLE.fullmatch(secret):
            raise SpecError(f"Secret({secret!r}): name a variable of the node's environment, like Secret('HF_TOKEN')")
        super().__init__(secret=secret)


def parse_flags(text: str | Sequence[str]) -> dict[str, JsonValue]:
    """Turn pasted command-line flags into argument names and values.

    `"--max-model-len 8192 --enable-prefix-caching"` becomes
    `{"max_model_len": "8192", "enable_prefix_caching": True}`: values stay as they were written. Raises ValueError
    on a word that belongs to no flag.
    """
    try:
        tokens = shlex.split(text) if isinstance(text, str) else [str(t) for t in text]
    except ValueError as error:
        raise ValueError(f"engine_args={text!r}: {error}") from None
    found: dict[str, list[str]] = {}
    values: list[str] | None = None
    for token in tokens:
        if token.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", token):
            flag, equals, value = OPTIMIZATION.sub("-O=", token).lstrip("-").partition("=")
            if not flag:
                raise ValueError(f"engine_args={token!r}: a flag has a name, like '--max-model-len 8192'")
            name = flag if token.startswith("--") else SHORT_FLAGS.get(flag, flag)
            values = found.setdefault(_argument(name), [])
            if equals:
                values.append(value)
        elif values is None:
            raise ValueError(f"engine_args={token!r}: flags start with '--', like '--max-model-len 8192'")
        else:
            values.append(token)
    return {name: True if not got else got[0] if len(got) == 1 else list[JsonValue](got) for name, got in found.items()}


def _argument(flag: str) -> str:
    """`max-model-len` → `max_model_len`; what is after a dot stays as it is."""
    first, dot, rest = flag.lstrip("-").partition(".")
    return first.replace("-", "_") + dot + rest


def _accelerators(value: Any) -> Any:
    """`"A10G:2"` → (("A10G",), 2): kinds in order of preference, and how many each replica takes."""
    if value is None or isinstance(value, dict):
        return value
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"accelerator={value!r}: write a name like 'A10G', 'A10G:2' or 'cpu', or a list of names")  # noqa: TRY004
    wanted = [value] if isinstance(value, str) else list(value)
    if not wanted:
        raise ValueError("accelerator=[]: name at least one, or leave it out for any GPU")
    kinds: list[str] = []
    counts: set[int] = set()
    for item in wanted:
        kind, colon, count = str(item).partition(":")
        if not kind or (colon and not (count.isdigit() and int(count) > 0)):
            raise ValueError(f"accelerator={item!r}: write a name, or a name and a number, like 'A10G:2'")
        kinds.append(kind)
        if colon:
            counts.add(int(count))
    if len(counts) > 1:
        raise ValueError(f"accelerator={wanted!r}: every kind needs the same number of GPUs")
    if "cpu" in kinds and (len(kinds) > 1 or counts):
        raise ValueError(f"accelerator={wanted!r}: 'cpu' stands alone; cpus= says how many")
    return {"kinds": kinds, "count": counts.pop() if counts else None}


class Accelerator(BaseModel):
    """What a replica runs on: `kinds` in order of preference; `count` where it was written as `KIND:N`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kinds: tuple[str, ...]
    count: int | None = None

    def __str__(self) -> str:
        suffix = f":{self.count}" if self.count else ""
        return ", ".join(kind + suffix for kind in self.kinds)


class Code(BaseModel):
    """The user's own code, for a class with hooks or requirements."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    package: str = Field(description="sha256 of the zip")
    file: str = Field(description="the app file's path inside the zip")
    cls: str = Field(description="the class's name in that file")
    hooks: tuple[str, ...] = ()


class ModelSpec(BaseModel):
    """One `@llm`. Times are in seconds. See `llm` for what each field means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: AnyWeights
    aliases: tuple[str, ...] = ()
    accelerator: Annotated[Accelerator | None, BeforeValidator(_accelerators)] = None
    gpus: int | float | None = Field(default=None, ge=0, allow_inf_nan=False)
    nodes: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, gt=0)
    lora: Annotated[LoRA | None, BeforeValidator(as_lora)] = None
    min_replicas: int = Field(default=0, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    idle_timeout: float = Field(default=300, gt=0, allow_inf_nan=False)
    schedule: tuple[str, ...] = ()
    min_uptime: float = Field(default=60, ge=0, allow_inf_nan=False)
    evictable: bool = True
    target_ongoing_requests: int = Field(default=32, ge=1)
    max_ongoing_requests: int = Field(default=256, ge=1)
    max_queued: int = Field(default=1000, ge=1)
    rpm: int = Field(default=0, ge=0)
    tpm: int = Field(default=0, ge=0)
    max_in_flight: int = Field(default=0, ge=0)
    cold_start: Literal["default", "fast"] = "default"
    task: Literal["auto", "generate", "embed", "classify", "score"] = "auto"
    log_engine_metrics: bool = True
    engine: str = "vllm"
    engine_args: dict[str, JsonValue] = Field(default_factory=dict)
    env: dict[str, Secret | str] = Field(default_factory=dict)
    requirements: tuple[str, ...] = ()
    code: Code | None = None

    @field_validator("name")
    @classmethod
    def _label(cls, name: str) -> str:
        if not DNS_LABEL.fullmatch(name):
            fixed = to_label(name)
            hint = f", like {fixed!r}" if fixed else ""
            raise ValueError(f"name={name!r}: a name is a DNS label: 1 to 63 lower-case letters, digits and '-'{hint}")
        return name

    @field_validator("gpus")
    @classmethod
    def _whole_or_less_than_one(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus >= 1 and gpus != int(gpus):
            raise ValueError(f"gpus={gpus}: a number of GPUs, or a part of one (0.5)")
        return int(gpus) if gpus is not None and gpus == int(gpus) else gpus

    @field_validator("aliases", "requirements", mode="before")
    @classmethod
    def _no_bare_string(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"{info.field_name}={value!r}: write a list, {info.field_name}=[{value!r}]")  # noqa: TRY004 - pydantic turns only ValueError into a message
        return value

    @field_validator("schedule", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @field_validator("schedule")
    @classmethod
    def _windows(cls, schedule: tuple[str, ...]) -> tuple[str, ...]:
        for text in schedule:
            parse_window(text)
        return schedule

    @field_validator("aliases")
    @classmethod
    def _alias(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        for alias in aliases:
            if not ALIAS.fullmatch(alias):
                raise ValueError(f"aliases={alias!r}: letters, digits, '.', '_', '-' and '/', like 'org/model'")
        if len(set(aliases)) < len(aliases):
            raise ValueError(f"aliases={list(aliases)!r}: one of them stands there twice")
        return aliases

    @field_validator("engine_args", mode="before")
    @classmethod
    def _flags(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, list | tuple) and value):
            return parse_flags(value)
        if isinstance(value, dict):
            return {_argument(str(key)): item for key, item in value.items()}
        return value or {}

    @field_validator("engine_args")
    @classmethod
    def _not_ours(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for key in value:
            if key in OWN_ENGINE_ARGS:
                raise ValueError(f"engine_args={key!r}: llmrun sets it; {OWN_ENGINE_ARGS[key]}")
        return value

    @field_validator("env", mode="before")
    @classmethod
    def _strings(cls, env: Any) -> Any:
        if not isinstance(env, dict):
            raise ValueError('env: write a dict, like {"HF_TOKEN": Secret("HF_TOKEN")}')  # noqa: TRY004
        for key, value in env.items():
            if not isinstance(value, str | Secret | dict):
                kind = type(value).__name__
                raise ValueError(f"env={key!r}: its value is a string or a Secret, not {kind}")  # noqa: TRY004
        return env

    @field_validator("env")
    @classmethod
    def _variables(cls, env: dict[str, Secret | str]) -> dict[str, Secret | str]:
        for key in env:
            if not VARIABLE.fullmatch(key):
                raise ValueError(f"env={key!r}: a variable's name has letters, digits and '_'")
            if key.startswith("LLMRUN_"):
                raise ValueError(f"env={key!r}: names that start with LLMRUN_ are llmrun's own")
        return env

    @model_validator(mode="after")
    def _together(self) -> ModelSpec:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas}: more than max_replicas={self.max_replicas}; "
                f"raise max_replicas or lower min_replicas"
            )
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests={self.target_ongoing_requests}: more than "
                f"max_ongoing_requests={self.max_ongoing_requests}; lower it, or raise the other"
            )
        if self.name in self.aliases:
            raise ValueError(f"aliases={self.name!r}: that is the model's own name; leave it out")
        for name in PARALLEL:
            size = self.engine_args.get(name)
            if size is not None and not (str(size).isdigit() and int(str(size)) > 0):
                raise ValueError(f"engine_args: {name}={size!r}: a number of GPUs, 1 or more")
        self._check_gpus()
        if self.on_cpu and self.gpus:
            raise ValueError(f"gpus={self.gpus}: accelerator='cpu' has none; leave one of the two out")
        if self.accelerator and not self.on_cpu and self.gpus == 0:
            raise ValueError(f"gpus=0: accelerator={str(self.accelerator)!r} is a GPU; leave one of the two out")
        return self

    def _check_gpus(self) -> None:
        """The numbers of GPUs that are said in several places agree. Raises ValueError."""
        parallel, counts = self.parallel, dict[str, float]()
        for key, count in (("accelerator", self.accelerator.count if self.accelerator else None), ("gpus", self.gpus)):
            if count is not None:
                counts[key] = count
        product = math.prod(parallel.values())
        for count in counts.values():
            # Without a tensor_parallel_size, that is what is left of them.
            fits = count == product or (PARALLEL[0] not in parallel and count >= 1 and count % product == 0)
            if len(set(counts.values())) > 1 or (parallel and not fits):
                text = ", ".join(f"{name} says {size:g}" for name, size in (counts | parallel).items())
                raise ValueError(f"gpus={self.gpus}: the numbers of GPUs differ ({text}); say it once")
        if self.nodes > 1 and (self.on_cpu or self.gpu_count < self.nodes or self.gpu_count % self.nodes):
            raise ValueError(
                f"nodes={self.nodes}: each gets the same number of GPUs, at least one: write gpus={2 * self.nodes}, "
                f"the number of all of them together"
            )

    @property
    def parallel(self) -> dict[str, int]:
        """What the author's engine_args say of GPUs that work together."""
        said = {name: self.engine_args.get(name) for name in PARALLEL}
        return {name: int(str(size)) for name, size in said.items() if size is not None}

    @property
    def on_cpu(self) -> bool:
        """Whether the author forced CPU."""
        return self.accelerator is not None and self.accelerator.kinds == ("cpu",)

    @property
    def gpu_count(self) -> float:
        """GPUs that one replica takes where it runs on GPUs, on all its nodes together: as written, else one."""
        for count in (self.accelerator.count if self.accelerator else None, self.gpus):
            if count is not None:
                return count
        return math.prod(self.parallel.values())

    @property
    def path(self) -> str | None:
        """The weights' place on disk, if `model` is a path."""
        return self.model.path

    @property
    def served_names(self) -> tuple[str, ...]:
        """All the names that clients may ask for, the public name first."""
        return (self.name, *self.aliases)

    def scheduled(self, now: float) -> bool:
        """Whether its schedule keeps it warm at `now` (unix time)."""
        return any(parse_window(text).covers(now) for text in self.schedule)

    def fingerprint(self, *, soft: bool = True) -> str:
        """A hash (hex, sha256) of what was said; without the soft fields, of what a replica runs."""
        data = self.model_dump(mode="json", exclude=None if soft else SOFT)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def to_label(text: str) -> str:
    """`QwenChat`, `Qwen/Qwen2.5-7B`, `my_app` → a DNS label in kebab-case; "" if nothing is left."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "-", text)
    text = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return text[:63].rstrip("-")
