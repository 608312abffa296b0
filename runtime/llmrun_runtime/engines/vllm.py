"""vLLM as an engine: its command line, its environment, and how to read its log. Does not import vLLM."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from llmrun_runtime.engines.base import IDLE_CONNECTION_S, Launch, to_flags

# "(EngineCore pid=12) ERROR 11-22 15:50:00 [core.py:1] " in front of a line of vLLM's log.
PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s?)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\]\s?)?")
EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*(Error|Exception|Interrupt|NotFound|Refused))(: .*)?$")
ARGPARSE = re.compile(r"^\S+: error: (.+)$")
VALUE_ERROR = re.compile(r"^\s+(?:Value error, |Assertion failed, )(.+?)(?: \[type=.*)?$")
SECONDHAND = (
    "Engine core initialization failed",
    "Engine core proc",
    "EngineDeadError",
    "CancelledError",
    "KeyboardInterrupt",
    "SystemExit",
)


WANTED = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


class VLLM:
    """vLLM's OpenAI server, started through `vllm_server` so that it holds the lease and carries the shim."""

    name = "vllm"
    paths = frozenset({"/v1/chat/completions", "/v1/completions"})

    module = "llmrun_runtime.engines.vllm_server"

    def command(self, launch: Launch) -> list[str]:
        """The server as a plain process."""
        return [launch.python, "-m", self.module, *self.arguments(launch)]

    def libraries(self) -> tuple[str, ...]:
        """On a CPU vLLM gives its engine cores torch's own OpenMP."""
        spec = importlib.util.find_spec("torch")
        libs = [Path(folder) / "lib" for folder in (spec.submodule_search_locations if spec else None) or ()]
        if any(lib.glob("libtorch_cuda.so") for lib in libs):
            return ()
        return tuple(str(file) for lib in libs for file in sorted(lib.glob("libgomp*.so*"))[:1])

    def arguments(self, launch: Launch) -> list[str]:
        """vLLM's own flags, llmrun's first, so that nothing pasted can come between."""
        gpus = len(launch.members[0].devices)
        args = dict(launch.engine_args)
        if gpus > 1:
            args.setdefault("tensor_parallel_size", gpus)
        return [
            *("--model", launch.weights),
            *("--served-model-name", *launch.names),
            *("--host", launch.members[0].host),
            *("--port", "0"),  # the kernel's choice; the server tells the replica which
            *("--middleware", "llmrun_runtime.engines.shim.Shim"),
            "--disable-uvicorn-access-log",
            *to_flags(args),
        ]

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """No usage data; no question to a hub, for weights lie on the disk; the lease in every process."""
        ours = {key: env.get(key, value) for key, value in WANTED.items()}
        # Longer than the ingress keeps an idle connection: it is never the engine that closes one under a request.
        ours["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = str(2 * IDLE_CONNECTION_S)
        if "VLLM_PLUGINS" in env:  # a list of those allowed; without it all are
            ours["VLLM_PLUGINS"] = f"{env['VLLM_PLUGINS']},llmrun_lease".lstrip(",")
        return ours

    def root_cause(self, log: str) -> str:
        """The last exception that is not the echo of another process's, or what argparse refused."""
        cause = ""
        lines = [PREFIX.sub("", line).rstrip() for line in log.splitlines()]
        for number, line in enumerate(lines):
            if match := ARGPARSE.match(line):
                cause = match[1]
            elif (match := EXCEPTION.match(line)) and not any(echo in line for echo in SECONDHAND):
                cause = line
                if "validation error" in line:  # pydantic puts the reason on the lines after
                    detail = next(
                        (m[1] for after in lines[number + 1 : number + 4] if (m := VALUE_ERROR.match(after))),
                        "",
                    )
                    cause = f"ValueError: {detail}" if detail else cause
        return cause
