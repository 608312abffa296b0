"""SGLang as an engine. Its command line is tested; it has not been run, because it needs a GPU.

Flags: https://docs.sglang.ai/advanced_features/server_arguments.html
"""

from __future__ import annotations

from llmrun_runtime.engines.base import Launch, to_flags
from llmrun_runtime.engines.sidecar.engine import PORT, SidecarEngine

MAX_MEMORY_FRACTION = 0.88
PARALLEL_ARGS = {"tp_size", "tensor_parallel_size"}


class SGLang(SidecarEngine):
    """`python -m sglang.launch_server`. Its `/health` answers after it has generated a first token."""

    name = package = "sglang"
    paths = frozenset(
        {
            *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate"),
            *("/v1/embeddings", "/v1/score", "/v1/rerank", "/classify"),
        }
    )
    probe_paths = frozenset({"/v1/completions", "/v1/embeddings"})
    tasks = frozenset({"auto", "generate", "embed"})

    def arguments(self, launch: Launch) -> list[str]:
        """Return the command line of SGLang's server, with the flags of `engine_args`."""
        args = dict(launch.engine_args)
        gpus = len(launch.members[0].devices)
        if gpus > 1 and not args.keys() & PARALLEL_ARGS:
            args["tp_size"] = gpus
        if gpus and launch.gpu_share < 1:
            args.setdefault("mem_fraction_static", round(MAX_MEMORY_FRACTION * launch.gpu_share, 3))
        if not gpus:
            args.setdefault("device", "cpu")
        if launch.task == "embed":
            args.setdefault("is_embedding", True)
        model = ("--model-path", launch.weights, "--served-model-name", launch.names[0], "--enable-metrics")
        address = ("--host", "127.0.0.1", "--port", PORT)
        return [launch.python, "-P", "-m", "sglang.launch_server", *model, *address, *to_flags(args)]
