"""vLLM as an engine: its command line, its environment, and how to read its log. Does not import vLLM."""

from __future__ import annotations

import os
import re

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


class VLLM:
    """vLLM's OpenAI server, started through `vllm_server` so that it holds the lease and carries the shim."""

    name = "vllm"
    paths = frozenset({"/v1/chat/completions", "/v1/completions"})

    def command(self, launch: Launch) -> list[str]:
        """vLLM's own flags, llmrun's first, so that nothing pasted can come between."""
        gpus = len(launch.members[0].devices)
        args = dict(launch.engine_args)
        if gpus > 1:
            args.setdefault("tensor_parallel_size", gpus)
        return [
            *(launch.python, "-m", "llmrun_runtime.engines.vllm_server"),
            *("--model", launch.weights),
            *("--served-model-name", *launch.names),
            *("--host", launch.members[0].host),
            *("--port", "0"),  # the kernel's choice; the server tells the replica which
            *("--middleware", "llmrun_runtime.engines.shim.Shim"),
            "--disable-uvicorn-access-log",
            *to_flags(args),
        ]

    def environment(self, launch: Launch) -> dict[str, str]:
        """No usage data; no question to a hub about weights that lie on disk; the lease in every process."""
        wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
        if os.path.isabs(launch.weights):
            wanted["HF_HUB_OFFLINE"] = "1"
        env = {key: launch.env.get(key, value) for key, value in wanted.items()}
        # Longer than the ingress keeps an idle connection: it is never the engine that closes one under a request.
        env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = str(2 * IDLE_CONNECTION_S)
        if "VLLM_PLUGINS" in launch.env:  # a list of those allowed; without it all are
            env["VLLM_PLUGINS"] = f"{launch.env['VLLM_PLUGINS']},llmrun_lease".lstrip(",")
        return env

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
