"""The contract of an engine: how it is started, which paths it speaks, what its log says when it fails.

Knows nothing of Ray, of control or of the ingress. An engine that keeps to this page can be served:
every one of its processes holds the lease (`lease.hold`), and its HTTP side carries the shim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import JsonValue

if TYPE_CHECKING:  # a process that only holds a lease needs neither
    import contextlib

    from llmrun.spec import ModelSpec

# The engine's processes find these in their environment.
LEASE_ENV = "LLMRUN_LEASE"  # host:port of the replica's lease
TOKEN_ENV = "LLMRUN_TOKEN"  # the replica's secret
SHIM_ENV = "LLMRUN_SHIM"  # JSON of ShimConfig


@dataclass(frozen=True)
class Member:
    """One process group of an engine: the node it runs on, its devices there, its rank. Rank 0 serves HTTP."""

    node: str
    host: str
    devices: tuple[str, ...] = ()
    rank: int = 0


@dataclass(frozen=True)
class ShimConfig:
    """What the shim inside the engine must know of the user's own code; no hooks, no code."""

    model: str
    file: str = ""
    cls: str = ""
    hooks: tuple[str, ...] = ()
    hook_timeout: float = 30
    host: str = "127.0.0.1"
    """Where it listens for ingresses."""
    engine: str = ""
    """The engine's kind, where it has adapters."""
    max_loaded: int = 0
    """Adapters that the engine holds at once; 0: it has none."""
    max_rank: int = 0
    """The largest rank that one of them may have."""
    canary: str = ""
    """Where the first answers of adapters are kept; "": they are not compared."""

    def to_json(self) -> str:
        """For the environment of the engine."""
        return json.dumps(self.__dict__)

    @classmethod
    def from_json(cls, text: str) -> ShimConfig:
        """The other way."""
        data = json.loads(text)
        return cls(**{**data, "hooks": tuple(data.get("hooks", ()))})


@dataclass(frozen=True)
class Launch:
    """Everything a member of an engine is started from."""

    names: tuple[str, ...]
    weights: str
    members: tuple[Member, ...]
    """All of them, the first one first; more than one only where the model said `nodes=`."""
    engine_args: dict[str, JsonValue]
    python: str
    env: dict[str, str] = field(default_factory=dict)
    shim: ShimConfig = field(default_factory=lambda: ShimConfig(model=""))
    log: Path = Path("/dev/null")
    cache: Path | None = None
    """Where the engine keeps what it may find again at its next start; of this model's version alone."""
    task: str = "auto"
    """What the model is for (`llmrun.spec.ModelSpec.task`)."""
    fast_start: bool = False
    """Whether a quick start is worth some speed under load (`cold_start="fast"`)."""
    warm: Path | None = None
    """The socket of the node's warm parent; None where there is none."""
    rank: int = 0
    """Which of the members this is."""
    port: int = 0
    """Where, on the first one's host, they meet; 0 where there is one."""
    gpu_share: float = 1
    """Of its one GPU, the part that is this engine's."""


TokenLogprobs = dict[str, float]
"""Log-probabilities of the likeliest tokens at one place."""


class Loader(Protocol):
    """How one kind of engine takes adapters."""

    async def load(self, name: str, folder: Path) -> Any:
        """Put an adapter into the engine; what `unload` and `using` want. Raises AdapterError; nothing is left then."""
        ...

    async def unload(self, adapter: Any) -> None:
        """Take it out again."""
        ...

    async def probe(self, adapter: Any) -> list[TokenLogprobs]:
        """What comes under it after some fixed prompts."""
        ...

    def using(self, adapter: Any) -> contextlib.AbstractContextManager[None]:
        """The requests that this task makes of the engine meanwhile are for that adapter."""
        ...


class Engine(Protocol):
    """One kind of engine, made without arguments.

    1. It starts by `command`, with `environment` and the variables above; each process calls `lease.hold()` first.
    2. It is ready when it has told the lease its HTTP `port`, its app's lifespan has started (the shim tells the lease
       then), and `STATE_PATH` answers.
    3. It speaks OpenAI's API at those of `paths` that its app has routes for.
    4. It takes adapters through `loader`, if it takes any; `refuses` says what it cannot serve, before it starts.
    5. It reports at `STATE_PATH`: requests in flight, usage (by `meter`), paths, adapters; at `/metrics` what it likes.
    6. It ends on SIGTERM, and by itself when its lease closes. If it ends otherwise, `root_cause` reads its log.
    """

    name: str
    paths: frozenset[str]
    """The inference paths that may be reached through the ingress; its administration never."""

    module: str
    """The module that `command` runs with `-m`. A warm parent imports it, calls its `preload()`, and in each child sets
    `sys.argv` and calls its `main()`; its `PACKAGE` names what is imported. "" where a warm parent is of no use."""

    def refuses(self, spec: ModelSpec) -> str:
        """Why it cannot serve such a model, in one line for its author; "" if it may."""
        ...

    def command(self, launch: Launch) -> list[str]:
        """The command line of the member `launch.rank`; that of rank 0 listens on its host. Raises EngineError."""
        ...

    def arguments(self, launch: Launch) -> list[str]:
        """What comes after the module in `command`."""
        ...

    def libraries(self) -> tuple[str, ...]:
        """Shared libraries that its processes must load first (LD_PRELOAD)."""
        ...

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        """Variables for this engine, over `env`; `cache` is None for a warm parent."""
        ...

    def loader(self, app: Any, max_rank: int) -> Loader:
        """How it takes adapters, by its server's `app`, in whose process this is called. Raises EngineError if not."""
        ...

    def root_cause(self, log: str) -> str:
        """The one line of `log` (the end of it) that says why the engine failed; "" if none does."""
        ...


def to_flags(engine_args: dict[str, JsonValue]) -> list[str]:
    """Argument names and values as command-line flags: True `--x`, False `--no-x`, dicts as JSON."""
    flags: list[str] = []
    for key, value in engine_args.items():
        first, dot, rest = key.partition(".")  # of `a_b.c_d` vLLM keeps what is after the dot
        name = first.replace("_", "-") + dot + rest
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *(str(item) for item in value)]
        else:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
