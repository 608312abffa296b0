"""Engines whose process cannot contain the shim: any OpenAI-compatible server, with a sidecar in front of it.

Such an engine is a short class: its paths, its command line, and the models that it refuses. Imports no server.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import JsonValue

from llmrun.errors import EngineError
from llmrun.spec import ModelSpec
from llmrun_runtime.engines.base import Launch

SIDECAR = "llmrun_runtime.engines.sidecar.server"
PORT = "{port}"
"""Placeholder in a command for the port, which the sidecar chooses."""
SOCKET = "{socket}"
"""Placeholder for the path of a Unix socket. A command with it listens there, out of reach of other accounts."""
MEDIA_HOSTS = "allowed_media_domains"
"""The engine argument, named as in vLLM, with the hosts from which the server may fetch media."""
DEFAULT_ENV = {
    **{"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"},
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # the Hub's command line tools check for newer releases of themselves
}
EXCEPTION = re.compile(r"^(?:\[[^\]]*\]\s*)?((?:[A-Za-z_][\w.]*(?:Error|Exception)|\S+: error|Error): .+)$")


@dataclass(frozen=True)
class SidecarConfig:
    """The configuration of a sidecar."""

    host: str
    """The address on which the sidecar listens, for the replica and ingresses."""
    name: str
    """The model's name for clients."""
    model: str
    """The model's name for the server. The sidecar translates `model` in requests and answers."""
    health: str
    """The path that returns 200 once the server is ready."""
    paths: tuple[str, ...]
    """The inference paths to forward; those missing from the server's OpenAPI document are removed."""
    get_paths: tuple[str, ...]
    """The paths to forward with GET."""
    media_hosts: tuple[str, ...] = ()
    """The hosts from which the server may fetch media that requests name."""

    def to_json(self) -> str:
        """Serialize for the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SidecarConfig:
        """Parse the output of `to_json`."""
        data = json.loads(text)
        lists = {name: tuple(data[name]) for name in ("paths", "get_paths", "media_hosts")}
        return cls(**{**data, **lists})


def media_hosts(engine_args: Mapping[str, JsonValue]) -> tuple[str, ...]:
    """Return the hosts of `allowed_media_domains`."""
    hosts = engine_args.get(MEDIA_HOSTS) or []
    return tuple(str(host).lower() for host in (hosts if isinstance(hosts, list) else [hosts]))


class SidecarEngine:
    """The base class. Every account of the node can reach a server on PORT, none a server on SOCKET."""

    name = ""
    package = ""
    """The package to import, with the same name for `pip install`."""
    paths: frozenset[str] = frozenset()
    module = ""
    health = "/health"
    get_paths: tuple[str, ...] = ("/v1/models", "/metrics", "/health")
    probe_paths: frozenset[str] = frozenset()
    tasks: frozenset[str] = frozenset({"auto", "generate"})

    def warning(self, launch: Launch, paths: Collection[str]) -> str:
        """See Engine."""
        return ""

    def refuses(self, spec: ModelSpec) -> str:
        """See Engine."""
        if spec.lora:
            return f"engine={self.name!r} does not support adapters here: remove lora= or use engine='vllm'"
        if spec.nodes > 1:
            return f"engine={self.name!r} does not support several nodes here: remove nodes= or use engine='vllm'"
        if spec.task not in self.tasks:
            return f"engine={self.name!r} does not support task={spec.task!r} here: use engine='vllm'"
        return ""

    def command(self, launch: Launch) -> list[str]:
        """See Engine. Raises EngineError if the package is not installed."""
        if importlib.util.find_spec(self.package) is None:
            text = f"engine={self.name!r}: {self.package} is not installed on the node: pip install {self.package}"
            raise EngineError(text)
        config = SidecarConfig(
            launch.members[0].host,
            launch.names[0],
            self.server_model_name(launch),
            self.health,
            tuple(sorted(self.paths)),
            self.get_paths,
            media_hosts(launch.engine_args),
        )
        args = {name: value for name, value in launch.engine_args.items() if name != MEDIA_HOSTS}
        command = self.arguments(replace(launch, engine_args=args))
        return [launch.python, "-P", "-m", SIDECAR, config.to_json(), *command]

    def server_model_name(self, launch: Launch) -> str:
        """Return the model's name for the server."""
        return launch.names[0]

    def arguments(self, launch: Launch) -> list[str]:
        """Return the server's command line, which contains PORT or SOCKET."""
        raise NotImplementedError

    def libraries(self) -> tuple[str, ...]:
        """See Engine."""
        return ()

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        """Disable downloads from the Hub: the weights are on disk."""
        return {key: env.get(key, value) for key, value in DEFAULT_ENV.items()}

    def loader(self, app: Any, max_lora_rank: int) -> NoReturn:
        """See Engine."""
        raise EngineError(f"engine={self.name!r} does not support adapters here")

    def has_ended(self, app: Any) -> bool:
        """Never: the sidecar exits with its server."""
        return False

    def root_cause(self, log: str) -> str:
        """Return the last exception."""
        matches = (EXCEPTION.match(line.strip()) for line in reversed(log.splitlines()))
        return next((match[1] for match in matches if match), "")
