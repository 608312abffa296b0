"""Engines whose process the shim cannot be in: any server of OpenAI's API, with a sidecar in front of it.

Such an engine is a class of a few lines: its paths, its command, and which models it refuses. Imports no server.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmrun.errors import EngineError
from llmrun.spec import ModelSpec
from llmrun_runtime.engines.base import Launch

SIDECAR = "llmrun_runtime.engines.sidecar.server"
PORT = "{port}"
"""Stands in a command for the port, which the sidecar chooses."""
WANTED = {
    **{"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"},
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # the Hub's command lines ask a registry for newer ones of themselves
}
EXCEPTION = re.compile(r"^(?:\[[^\]]*\]\s*)?((?:[A-Za-z_][\w.]*(?:Error|Exception)|\S+: error|Error): .+)$")


@dataclass(frozen=True)
class SidecarConfig:
    """What a sidecar must know of its server."""

    host: str
    """Where the replica and ingresses reach the sidecar."""
    name: str
    """What clients call the model."""
    model: str
    """What the server calls it: `model` in bodies is changed, and back in answers."""
    health: str
    """The path that answers 200 once the server can be asked."""
    paths: tuple[str, ...]
    """The inference paths that it may have; those that its OpenAPI document lacks are left out."""
    reads: tuple[str, ...]
    """What may be asked for with GET."""

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SidecarConfig:
        """The other way."""
        data = json.loads(text)
        return cls(**{**data, "paths": tuple(data["paths"]), "reads": tuple(data["reads"])})


class SidecarEngine:
    """What such engines have in common. It listens on 127.0.0.1 without a token: users of its node can reach it."""

    name = ""
    package = ""
    """What it imports, and what `pip` installs."""
    paths: frozenset[str] = frozenset()
    module = ""
    health = "/health"
    reads: tuple[str, ...] = ("/v1/models", "/metrics", "/health")
    tasks: frozenset[str] = frozenset({"auto", "generate"})

    def refuses(self, spec: ModelSpec) -> str:
        """See Engine."""
        if spec.lora:
            return f"engine={self.name!r} takes no adapters here: leave lora= out, or use engine='vllm'"
        if spec.nodes > 1:
            return f"engine={self.name!r} spans no nodes here: leave nodes= out, or use engine='vllm'"
        if spec.task not in self.tasks:
            return f"engine={self.name!r} has no task={spec.task!r} here: use engine='vllm'"
        return ""

    def command(self, launch: Launch) -> list[str]:
        """See Engine. Raises EngineError where it is not installed."""
        if importlib.util.find_spec(self.package) is None:
            raise EngineError(
                f"engine={self.name!r}: {self.package} is not installed there: pip install {self.package}"
            )
        beside = SidecarConfig(
            launch.members[0].host,
            launch.names[0],
            self.called(launch),
            self.health,
            tuple(sorted(self.paths)),
            self.reads,
        )
        return [launch.python, "-m", SIDECAR, beside.to_json(), *self.arguments(launch)]

    def called(self, launch: Launch) -> str:
        """What the server calls the model."""
        return launch.names[0]

    def arguments(self, launch: Launch) -> list[str]:
        """The server's own command line, with PORT in it."""
        raise NotImplementedError

    def libraries(self) -> tuple[str, ...]:
        """See Engine."""
        return ()

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        """No question to a hub: weights lie on the disk."""
        return {key: env.get(key, value) for key, value in WANTED.items()}

    def loader(self, app: Any, max_rank: int) -> NoReturn:
        """See Engine."""
        raise EngineError(f"engine={self.name!r} takes no adapters here")

    def root_cause(self, log: str) -> str:
        """The last exception."""
        found = (EXCEPTION.match(line.strip()) for line in reversed(log.splitlines()))
        return next((match[1] for match in found if match), "")
