"""The engine contract: how an engine starts, which paths it serves, how it takes adapters, how to read its log.

Does not depend on Ray, control or the ingress. Standard library only: every engine process imports this module first.
"""

from __future__ import annotations

import hmac
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a process that only holds a lease needs none of these
    import contextlib

    from pydantic import JsonValue

    from llmrun.spec import ModelSpec

# Environment variables of engine processes.
LEASE_ENV = "LLMRUN_LEASE"  # host:port of the replica's lease
TOKEN_ENV = "LLMRUN_TOKEN"  # the replica's secret
SHIM_ENV = "LLMRUN_SHIM"  # ShimConfig as JSON
CORES_ENV = "LLMRUN_CORES"  # the CPUs to compute on, "0,1"; only for `Launch.gets_cores` without THREADS_ENV
# The variables with which an author chooses threads or cores himself.
THREADS_ENV = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")


# The process groups of torch listen on the address of the host's name, which may be on a network, also if all their
# members are processes of one engine. They take what arrives without a credential.
LOOPBACK_ONLY = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo0" if sys.platform == "darwin" else "lo")


@dataclass(frozen=True)
class Member:
    """One member of an engine: the node it runs on and its devices there."""

    node: str
    host: str
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShimConfig:
    """The configuration of the shim: the user's hooks and the adapter slots. Without `hooks` no user code is loaded."""

    model: str
    file: str = ""
    cls: str = ""
    hooks: tuple[str, ...] = ()
    hook_timeout: float = 30
    host: str = "127.0.0.1"
    """The address on which it listens for ingresses."""
    engine: str = "vllm"
    """The engine's name."""
    max_loaded: int = 0
    """The number of adapter slots; 0: no adapters."""
    max_lora_rank: int = 0
    """The maximum LoRA rank of an adapter."""
    canary: str = ""
    """The folder of the adapters' reference answers; "": answers are not compared."""

    def to_json(self) -> str:
        """Serialize for the engine's environment."""
        return json.dumps(self.__dict__)

    @classmethod
    def from_json(cls, text: str) -> ShimConfig:
        """Parse the output of `to_json`."""
        data = json.loads(text)
        return cls(**{**data, "hooks": tuple(data.get("hooks", ()))})


@dataclass(frozen=True)
class Launch:
    """All inputs for starting one member of an engine."""

    names: tuple[str, ...]
    """The model's served names."""
    weights: str
    """The folder with the model's weights."""
    members: tuple[Member, ...]
    """All members, member 0 first; more than one only with `nodes=`."""
    engine_args: dict[str, JsonValue]
    python: str
    env: dict[str, str] = field(default_factory=dict)
    shim: ShimConfig = field(default_factory=lambda: ShimConfig(model=""))
    log: Path = Path("/dev/null")
    cache: Path | None = None
    """A folder that survives restarts, for this version of the model only."""
    task: str = "auto"
    """See `llmrun.spec.ModelSpec.task`."""
    fast_start: bool = False
    """Whether to trade some speed under load for a faster start (`cold_start="fast"`)."""
    forkserver: Path | None = None
    """The socket of the node's fork server; None if there is none."""
    member_rank: int = 0
    """The index of this member in `members`. Member 0 serves HTTP."""
    port: int = 0
    """The port on member 0's host where the members connect to each other; 0 with a single member."""
    gpu_share: float = 1
    """The engine's share of its GPU, if it has a single one."""
    cpus: float | None = None
    """The CPUs that the author reserves for it; None: what nobody has reserved."""
    workers: int = 1
    """The processes that compute: the product of its parallel sizes."""

    @property
    def gets_cores(self) -> bool:
        """Whether llmrun chooses the cores that it computes on: it has a single worker, and no device."""
        return len(self.members) == self.workers == 1 and not self.members[0].devices


TokenLogprobs = dict[str, float]
"""Log-probabilities of the most likely tokens at one position, by token."""


class Loader(Protocol):
    """Loads adapters into one type of engine."""

    async def load(self, name: str, folder: Path) -> Any:
        """Load an adapter; return a handle for the other methods.

        Raises AdapterError; the engine then holds nothing of it.
        """
        ...

    async def unload(self, adapter: Any) -> None:
        """Unload an adapter."""
        ...

    async def probe(self, adapter: Any) -> list[TokenLogprobs]:
        """Return the adapter's answers to some fixed prompts."""
        ...

    def using(self, adapter: Any) -> contextlib.AbstractContextManager[None]:
        """Return a context in which this task's requests to the engine use the adapter."""
        ...


class Engine(Protocol):
    """One type of engine. The class is instantiated without arguments.

    1. It starts with `command`, `environment` and the variables above; each process calls `lease.hold()` first.
    2. It is ready once it has sent its HTTP port (`lease.notify(port=…)`), its app's lifespan has started (the shim
       reports that), and `STATE_PATH` answers.
    3. It serves OpenAI's API at those of `paths` that its app has routes for.
    4. It loads adapters through `loader`, if it supports any; `refuses` rejects models that it cannot serve.
    5. `STATE_PATH` reports requests in flight, usage and the time since the last output (both from `usage_meter`),
       paths and adapters; `/metrics` is free.
    6. It exits on SIGTERM and when its lease closes. After any other exit, `root_cause` reads its log.
    """

    name: str
    paths: frozenset[str]
    """The inference paths that clients may reach through the ingress; never administrative ones."""

    probe_paths: frozenset[str]
    """Those of `paths` at which a request for one token is answered while long ones are in progress.

    If requests are in flight and the engine produces nothing, the replica sends such a request, and replaces an engine
    that does not answer it. Without such a path it asks `/health`.
    """

    module: str
    """The module that `command` runs with `-m`; "" if the engine cannot be forked.

    A fork server imports it and uses the functions that `forkserver.server` lists.
    """

    def refuses(self, spec: ModelSpec) -> str:
        """Return why the engine cannot serve this model, in one line for its author; "" if it can."""
        ...

    def warning(self, launch: Launch, paths: Collection[str]) -> str:
        """Return what of its `paths` it will refuse with these weights, for a deploy to show; "" if nothing."""
        ...

    def command(self, launch: Launch) -> list[str]:
        """Return the command line of member `launch.member_rank`; member 0 listens on its host. Raises EngineError."""
        ...

    def arguments(self, launch: Launch) -> list[str]:
        """Return the part of `command` after the module."""
        ...

    def libraries(self) -> tuple[str, ...]:
        """Return the shared libraries that the engine's processes must preload (LD_PRELOAD)."""
        ...

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        """Return the engine's own variables, which override `env`. `cache` is None for a fork server."""
        ...

    def loader(self, app: Any, max_lora_rank: int) -> Loader:
        """Return the loader of adapters for the server's `app`; called in the server's process.

        Raises EngineError if the engine has no adapters.
        """
        ...

    def has_ended(self, app: Any) -> bool:
        """Whether what the server's `app` serves has ended; called in the server's process for each message it sends.

        What the server still sends then is not taken for the engine's answer.
        """
        ...

    def root_cause(self, log: str) -> str:
        """Return the line of `log` (its last 64 KiB) that explains why the engine failed; "" if there is none."""
        ...


def to_flags(engine_args: dict[str, JsonValue]) -> list[str]:
    """Convert argument names and values to command-line flags: True `--x`, False `--no-x`, dicts as JSON."""
    flags: list[str] = []
    for key, value in engine_args.items():
        first, dot, rest = key.partition(".")  # vLLM expects the part after the dot unchanged
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


def prove_token(token: str, pid: int) -> str:
    """Return the proof that a process has the token of its replica."""
    return hmac.new(token.encode(), str(pid).encode(), "sha256").hexdigest()
