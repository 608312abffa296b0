"""The spec of a model: frozen and validated, JSON on the wire, hashed for diffs.

Checks only what can be checked without a cluster; it does not know which accelerators exist.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_validator, model_validator

from llmrun.accelerator import Accelerator, parse_accelerator
from llmrun.engine_args import PARALLEL_SIZES, RESERVED_ENGINE_ARGS, argument_name, parse_flags
from llmrun.errors import SpecError
from llmrun.lora import LoRA, as_lora
from llmrun.markers import Marker, marked
from llmrun.schedule import parse_window
from llmrun.weights import AnyWeights

# RFC 1123: a DNS label, so that a name can be a host name, a metric label and an application's name.
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# A Hub name or a label, without spaces, quotes and control characters.
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ColdStartMode = Literal["default", "fast"]
Task = Literal["auto", "generate", "embed", "classify", "score"]


# Of an environment variable whose value nobody should see.
SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY|AUTH)(_|$)")


class Secret(BaseModel):
    """A reference to an environment variable of the node: read where the engine starts, never stored or shown.

    `env={"HF_TOKEN": Secret("HF_TOKEN")}` gives the engine the node's `HF_TOKEN`.

    Args:
        secret: The name of the variable.

    Raises:
        SpecError: the name is not valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    secret: str

    def __init__(self, secret: str) -> None:
        if not isinstance(secret, str) or not VARIABLE.fullmatch(secret):
            raise SpecError(f"Secret({secret!r}): must name an environment variable of the node, like 'HF_TOKEN'")
        super().__init__(secret=secret)


class Code(BaseModel):
    """The user's own code, for a class with hooks or requirements."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    package: str = Field(description="sha256 of the zip")
    file: str = Field(description="the app file's path inside the zip")
    cls: str = Field(description="the class's name in that file")
    hooks: tuple[str, ...] = ()


class ModelSpec(BaseModel):
    """One `@llm`. Times are in seconds. LLMOptions has the accepted types and the description of each option."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: AnyWeights
    aliases: tuple[str, ...] = ()
    accelerator: Annotated[Accelerator | None, BeforeValidator(parse_accelerator)] = None
    gpus: int | float | None = Field(default=None, ge=0, allow_inf_nan=False)
    nodes: int = Field(default=1, ge=1)
    weights_nodes: Annotated[int, Marker.NO_RESTART, Marker.NEEDS_CONTROL] = Field(default=0, ge=0)
    cpus: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    lora: Annotated[LoRA | None, BeforeValidator(as_lora)] = None
    min_replicas: Annotated[int, Marker.NO_RESTART] = Field(default=0, ge=0)
    max_replicas: Annotated[int, Marker.NO_RESTART] = Field(default=1, ge=1)
    idle_timeout: Annotated[float, Marker.NO_RESTART] = Field(default=300, gt=0, allow_inf_nan=False)
    schedule: Annotated[tuple[str, ...], Marker.NO_RESTART, Marker.NEEDS_CONTROL] = ()
    min_uptime: Annotated[float, Marker.NO_RESTART, Marker.NEEDS_CONTROL] = Field(default=60, ge=0, allow_inf_nan=False)
    evictable: Annotated[bool, Marker.NO_RESTART, Marker.NEEDS_CONTROL] = True
    max_wait_for_room: Annotated[float, Marker.NO_RESTART, Marker.NEEDS_CONTROL] = Field(
        default=30, ge=0, allow_inf_nan=False
    )
    target_ongoing_requests: Annotated[int, Marker.NO_RESTART] = Field(default=32, ge=1)
    max_ongoing_requests: Annotated[int, Marker.NO_RESTART] = Field(default=256, ge=1)
    max_queued: Annotated[int, Marker.NO_RESTART] = Field(default=1000, ge=1)
    rpm: Annotated[int, Marker.NO_RESTART, Marker.NEEDS_CONTROL] = Field(default=0, ge=0)
    tpm: Annotated[int, Marker.NO_RESTART, Marker.NEEDS_CONTROL] = Field(default=0, ge=0)
    max_in_flight: Annotated[int, Marker.NO_RESTART, Marker.NEEDS_CONTROL] = Field(default=0, ge=0)
    max_output_tokens: Annotated[int, Marker.NO_RESTART, Marker.NEEDS_CONTROL] = Field(default=0, ge=0)
    stall_timeout: float = Field(default=120, ge=0, allow_inf_nan=False)
    cold_start: ColdStartMode = "default"
    task: Task = "auto"
    log_engine_metrics: Annotated[bool, Marker.NO_RESTART, Marker.NEEDS_CONTROL] = True
    engine: str = "vllm"
    engine_args: dict[str, JsonValue] = Field(default_factory=dict)
    env: dict[str, Secret | str] = Field(default_factory=dict)
    requirements: tuple[str, ...] = ()
    code: Code | None = None

    @field_validator("name")
    @classmethod
    def _is_label(cls, name: str) -> str:
        if not DNS_LABEL.fullmatch(name):
            label = to_label(name)
            hint = f", like {label!r}" if label else ""
            raise ValueError(
                f"name={name!r}: must be a DNS label: 1 to 63 lower-case letters, digits and hyphens{hint}"
            )
        return name

    @field_validator("gpus")
    @classmethod
    def _whole_or_fraction(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus >= 1 and gpus != int(gpus):
            raise ValueError(f"gpus={gpus}: must be a whole number, or a fraction of one GPU (0.5)")
        return int(gpus) if gpus is not None and gpus == int(gpus) else gpus

    @field_validator("aliases", "requirements", mode="before")
    @classmethod
    def _is_list(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"{info.field_name}={value!r}: must be a list: {info.field_name}=[{value!r}]")  # noqa: TRY004 - pydantic turns only ValueError into a message
        return value

    @field_validator("schedule", mode="before")
    @classmethod
    def _one_or_more_windows(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @field_validator("schedule")
    @classmethod
    def _are_windows(cls, schedule: tuple[str, ...]) -> tuple[str, ...]:
        for window in schedule:
            parse_window(window)
        return schedule

    @field_validator("aliases")
    @classmethod
    def _are_aliases(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        for alias in aliases:
            if not ALIAS.fullmatch(alias):
                raise ValueError(
                    f"aliases={alias!r}: only letters, digits, '.', '_', '-' and '/' are allowed, like 'org/model'"
                )
        if len(set(aliases)) < len(aliases):
            raise ValueError(f"aliases={list(aliases)!r}: duplicate alias")
        return aliases

    @field_validator("requirements")
    @classmethod
    def _are_packages(cls, requirements: tuple[str, ...]) -> tuple[str, ...]:
        from packaging.requirements import InvalidRequirement, Requirement  # noqa: PLC0415 - few models have any

        for requirement in requirements:
            if requirement.lstrip().startswith("-"):
                raise ValueError(
                    f"requirements={requirement!r}: must be a package, like 'numpy>=2', not an option. Set options on "
                    f"the nodes, as UV_INDEX for another index"
                )
            if not ("/" in requirement and " @ " not in requirement):  # a path or URL of a package
                try:
                    Requirement(requirement)
                except InvalidRequirement as error:
                    reason = str(error).splitlines()[0]
                    text = f"requirements={requirement!r}: must be a package, like 'numpy>=2': {reason}"
                    raise ValueError(text) from None
        return requirements

    @field_validator("engine_args", mode="before")
    @classmethod
    def _parse_engine_args(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, list | tuple) and value):
            return parse_flags(value)
        if isinstance(value, dict):
            return {argument_name(str(key)): item for key, item in value.items()}
        return value or {}

    @field_validator("engine_args")
    @classmethod
    def _not_reserved(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for key in value:
            if key in RESERVED_ENGINE_ARGS:
                raise ValueError(f"engine_args={key!r}: reserved by llmrun: {RESERVED_ENGINE_ARGS[key]}")
        return value

    @field_validator("env", mode="before")
    @classmethod
    def _are_strings(cls, env: Any) -> Any:
        if env is None:
            return {}
        if not isinstance(env, dict):
            raise ValueError('env: must be a dict, like {"HF_TOKEN": Secret("HF_TOKEN")}')  # noqa: TRY004
        for key, value in env.items():
            if not isinstance(value, str | Secret | dict):
                kind = type(value).__name__
                raise ValueError(f"env={key!r}: the value must be a string or a Secret, not {kind}")  # noqa: TRY004
        return env

    @field_validator("env")
    @classmethod
    def _are_variables(cls, env: dict[str, Secret | str]) -> dict[str, Secret | str]:
        for key in env:
            if not VARIABLE.fullmatch(key):
                raise ValueError(f"env={key!r}: a variable's name may contain only letters, digits and '_'")
            if key.startswith("LLMRUN_"):
                raise ValueError(f"env={key!r}: names that start with LLMRUN_ are reserved by llmrun")
        return env

    @model_validator(mode="after")
    def _check_combinations(self) -> ModelSpec:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas}: greater than max_replicas={self.max_replicas}; "
                f"raise max_replicas or lower min_replicas"
            )
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests={self.target_ongoing_requests}: greater than "
                f"max_ongoing_requests={self.max_ongoing_requests}; lower it or raise max_ongoing_requests"
            )
        if self.name in self.aliases:
            raise ValueError(f"aliases={self.name!r}: already the model's own name; remove it")
        for name in PARALLEL_SIZES:
            size = self.engine_args.get(name)
            if size is not None and not (str(size).isdigit() and int(str(size)) > 0):
                raise ValueError(f"engine_args: {name}={size!r}: must be a number of GPUs, 1 or more")
        self._check_gpus()
        if self.on_cpu and self.gpus:
            raise ValueError(f"gpus={self.gpus}: conflicts with accelerator='cpu'; remove one of them")
        if self.accelerator and not self.on_cpu and self.gpus == 0:
            raise ValueError(f"gpus=0: conflicts with accelerator={str(self.accelerator)!r}; remove one of them")
        return self

    def _check_gpus(self) -> None:
        """Check that all options that imply a number of GPUs agree. Raises ValueError."""
        parallel, counts = self.parallel, dict[str, float]()
        for key, count in (("accelerator", self.accelerator.count if self.accelerator else None), ("gpus", self.gpus)):
            if count is not None:
                counts[key] = count
        product = math.prod(parallel.values())
        for count in counts.values():
            # An omitted tensor_parallel_size becomes the quotient.
            fits = count == product or (PARALLEL_SIZES[0] not in parallel and count >= 1 and count % product == 0)
            if len(set(counts.values())) > 1 or (parallel and not fits):
                text = ", ".join(f"{name}: {size:g}" for name, size in (counts | parallel).items())
                raise ValueError(f"gpus={self.gpus}: conflicting numbers of GPUs ({text}); set only one of them")
        if self.nodes > 1 and (self.on_cpu or self.gpu_count < self.nodes or self.gpu_count % self.nodes):
            raise ValueError(
                f"nodes={self.nodes}: every node needs the same number of GPUs, at least one; "
                f"set gpus= to the total, like gpus={2 * self.nodes}"
            )

    @property
    def parallel(self) -> dict[str, int]:
        """The parallel sizes that engine_args set."""
        sizes = {name: self.engine_args.get(name) for name in PARALLEL_SIZES}
        return {name: int(str(size)) for name, size in sizes.items() if size is not None}

    @property
    def on_cpu(self) -> bool:
        """Whether the author chose the CPU."""
        return self.accelerator is not None and self.accelerator.kinds == ("cpu",)

    @property
    def gpu_count(self) -> float:
        """GPUs of one replica over all its nodes, if it runs on GPUs."""
        for count in (self.accelerator.count if self.accelerator else None, self.gpus):
            if count is not None:
                return count
        return math.prod(self.parallel.values())

    @property
    def reserved_cpus(self) -> float:
        """CPUs that Ray reserves for one replica on each of its nodes."""
        return 1 if self.cpus is None else self.cpus

    @property
    def path(self) -> str | None:
        """The weights' path on disk, if `model` is a path."""
        return self.model.path

    @property
    def served_names(self) -> tuple[str, ...]:
        """All names that clients may send as `model`, the public name first."""
        return (self.name, *self.aliases)

    def scheduled(self, now: float) -> bool:
        """Whether the schedule keeps a replica running at `now` (Unix time)."""
        return any(parse_window(window).covers(now) for window in self.schedule)

    def fingerprint(self, *, soft: bool = True) -> str:
        """Return the spec's sha256 in hex; with soft=False, without the options that change without a restart."""
        data = self.model_dump(mode="json", exclude=None if soft else SOFT_FIELDS)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


# An engine depends on how many adapters it holds, not on which ones exist.
SOFT_FIELDS: dict[str, Any] = {
    **dict.fromkeys(marked(ModelSpec, Marker.NO_RESTART), True),
    "lora": set(marked(LoRA, Marker.NO_RESTART)),
}


def to_label(text: str) -> str:
    """Turn `QwenChat`, `Qwen/Qwen2.5-7B` or `my_app` into a DNS label in kebab-case; "" if nothing is left."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "-", text)
    text = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return text[:63].rstrip("-")


def literal_secrets(specs: Iterable[ModelSpec]) -> list[str]:
    """Return a warning for each value in `env=` that looks like a secret: it is stored, exported and shown in plans."""
    return [
        f"{spec.name}: env={name!r} is stored and shown as it is. Secret({name!r}) is read on the node instead"
        for spec in specs
        for name, value in spec.env.items()
        if isinstance(value, str) and SECRET_NAME.search(name.upper())
    ]
