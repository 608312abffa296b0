"""Engine arguments as users write them: pasted flags or a mapping, and the arguments that llmrun reserves."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from pydantic import JsonValue

OPTIMIZATION_FLAG = re.compile(r"^-O(?=\d)")  # vLLM's -O3
# llmrun passes these to the engine itself.
RESERVED_ENGINE_ARGS = {
    "model": "use the first argument of @llm",
    "model_tag": "use the first argument of @llm",
    "served_model_name": "use name= and aliases=",
    "host": "the replica chooses it",
    "port": "the replica chooses it",
    "uds": "the replica chooses its address",
    "api_key": "each replica has its own secret token",
    "middleware": "define on_request in the class",
    "ssl_keyfile": "terminate TLS in front of the ingress",
    "ssl_certfile": "terminate TLS in front of the ingress",
    "enable_lora": "use lora=",
    "lora_modules": "use lora=",
    "max_loras": "use lora=LoRA(…, max_loaded=)",
    "max_cpu_loras": "use lora=LoRA(…, max_loaded=)",
    "max_lora_rank": "use lora=LoRA(…, max_rank=)",
    "api_server_count": "use max_replicas=",
    **{
        name: "use nodes=: the replica starts every member of an engine"
        for name in ("headless", "nnodes", "node_rank", "master_addr", "master_port")
    },
}
SHORT_FLAGS = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "n": "nnodes",
    "r": "node_rank",
    "q": "quantization",
    "cc": "compilation_config",
    "O": "optimization_level",
}
# Their product is the number of GPUs of a replica.
PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def parse_flags(flags: str | Sequence[str]) -> dict[str, JsonValue]:
    """Turn pasted command-line flags into argument names and values.

    `"--max-model-len 8192 --enable-prefix-caching"` becomes
    `{"max_model_len": "8192", "enable_prefix_caching": True}`: values stay as written. Raises ValueError for a word
    that belongs to no flag.
    """
    try:
        tokens = shlex.split(flags) if isinstance(flags, str) else [str(flag) for flag in flags]
    except ValueError as error:
        raise ValueError(f"engine_args={flags!r}: {error}") from None
    arguments: dict[str, list[str]] = {}
    values: list[str] | None = None
    for token in tokens:
        if token.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", token):
            flag, equals, value = OPTIMIZATION_FLAG.sub("-O=", token).lstrip("-").partition("=")
            if not flag:
                raise ValueError(f"engine_args={token!r}: a flag needs a name, like '--max-model-len 8192'")
            name = flag if token.startswith("--") else SHORT_FLAGS.get(flag, flag)
            values = arguments.setdefault(argument_name(name), [])
            if equals:
                values.append(value)
        elif values is None:
            raise ValueError(f"engine_args={token!r}: flags start with '--', like '--max-model-len 8192'")
        else:
            values.append(token)
    return {
        name: True if not values else values[0] if len(values) == 1 else list[JsonValue](values)
        for name, values in arguments.items()
    }


def argument_name(flag: str) -> str:
    """`max-model-len` → `max_model_len`; the part after a dot stays as written."""
    first, dot, rest = flag.lstrip("-").partition(".")
    return first.replace("-", "_") + dot + rest
