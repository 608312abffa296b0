"""The options of `@llm` as users write them: their names, the accepted types, and their descriptions.

ModelSpec has the rest: the stored type, the default, the constraints and the markers of each option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from pydantic import JsonValue

from llmrun.lora import LoRA
from llmrun.spec import ColdStartMode, Secret, Task
from llmrun.weights import Weights


class LLMOptions(TypedDict, total=False):
    """The keyword arguments of `@llm`. Times are in seconds."""

    name: str | None
    """The public name, which clients send as `model`: a DNS label. By default the class's name in kebab-case:
    `QwenChat` becomes `qwen-chat`."""
    aliases: Sequence[str]
    """More names that clients may send as `model`, like `org/model`. Names and aliases are unique on a cluster."""
    accelerator: str | Sequence[str] | None
    """What a replica runs on: `"cpu"`; a kind of GPU, `"A10G"`; a kind and the number of GPUs per replica, `"A10G:2"`;
    or several kinds in order of preference, `["H100", "A100"]`, of which the first that the cluster has is used. By
    default one GPU of any kind if the cluster has GPUs, otherwise the CPU."""
    gpus: float | None
    """GPUs per replica, over all its nodes. A fraction below 1, like `0.5`, leaves the rest of that GPU to other
    models; `0` runs on the CPU. By default the product of the engine's parallel sizes (`--tensor-parallel-size` and the
    like), which is 1 if none is set."""
    nodes: int
    """Nodes that each replica spans, with the same number of GPUs on each node."""
    weights_nodes: int
    """Nodes that get the weights at the deploy. Other nodes download them, from these, when a replica first starts
    there. With 0, as many as `max_replicas` replicas need, and at least two if two could run the model."""
    cpus: float | None
    """CPUs that Ray reserves for each replica; a fraction is allowed. By default 1. An engine without a GPU computes on
    that many cores of its own, and by default on all cores that no other replica has reserved, except the last one."""
    lora: LoRA | Weights | str | Mapping[str, Weights | str] | None
    """LoRA adapters, served as `model:adapter`: a place with one folder per adapter, `"s3://bucket/adapters"`, or the
    source of each adapter by name, `{"legal": "acme/legal@v3"}`. `LoRA(…)` sets more options. By default the model has
    no adapters."""
    min_replicas: int
    """Replicas that keep running when idle. With 0 the model scales to zero: it uses no GPU and no memory until the
    next request starts it."""
    max_replicas: int
    """The largest number of replicas."""
    idle_timeout: float
    """Seconds without a request after which replicas above `min_replicas` stop."""
    schedule: str | Sequence[str] | None
    """Hours during which one replica keeps running when idle: `"Mon-Fri 08:00-18:00 Europe/Berlin"`, or a list of such
    windows. A window without days applies every day; one without a time zone is in UTC. By default there is none."""
    min_uptime: float
    """Seconds after its start during which a replica cannot be evicted for another model."""
    evictable: bool
    """Whether idle replicas may be evicted when another model needs their resources. Replicas within `min_replicas`
    are never evicted."""
    max_wait_for_room: float
    """Seconds that requests wait while busy models use the resources. Then one of those gives way: it finishes its
    requests, stops, and waits for its own turn. Replicas within `min_uptime` or `min_replicas`, and models with
    `evictable=False`, never give way."""
    target_ongoing_requests: int
    """Requests in flight per replica above which another replica starts."""
    max_ongoing_requests: int
    """The largest number of requests in flight per replica. Further requests wait in the ingress."""
    max_queued: int
    """The largest number of requests that wait in the ingress while no replica is free. Further requests get status
    429."""
    rpm: int
    """Requests per minute, over all clients. Further requests get status 429. With 0 there is no limit. Each API key
    can have its own limits, too (`llmrun key create`)."""
    tpm: int
    """Tokens per minute, of prompts and answers together, over all clients. Further requests get status 429. With 0
    there is no limit."""
    max_in_flight: int
    """The largest number of requests that wait or are being answered, over all replicas and clients. Further requests
    get status 429. With 0 there is no limit."""
    max_output_tokens: int
    """The largest number of tokens that one request may generate, in all its choices together. Requests that ask for
    more get status 400; the others get it as their `max_tokens` if they set none. With 0 there is no limit."""
    stall_timeout: float
    """Seconds without any output while requests are in flight, after which the replica checks its engine with a request
    of its own, and replaces the engine if that is not answered in the same time or within 60 s. An engine that does not
    respond at all is replaced after the same time, 120 s at most. With 0 no output is waited for."""
    cold_start: ColdStartMode
    """`"fast"` shortens the start of an engine on GPUs at the cost of throughput: it skips preparations such as most
    CUDA graphs."""
    task: Task
    """What the model is used for. `"auto"` uses what the model was made for."""
    log_engine_metrics: bool
    """Whether `/metrics` includes the engine's own metrics."""
    engine: str
    """The name of the engine: `"vllm"`, `"sglang"`, `"transformers"`, or one that an installed package provides."""
    engine_args: Mapping[str, JsonValue] | Sequence[str] | str
    """Arguments of the engine: pasted flags, `"--max-model-len 8192"`, or a mapping, `{"max_model_len": 8192}`."""
    env: Mapping[str, str | Secret] | None
    """Environment variables of the engine and of weight downloads. The value of `Secret("NAME")` is read on the node
    and is never stored."""
    requirements: Sequence[str]
    """Packages (PEP 508) for the hooks of the class. They are installed next to the engine's packages and must not
    conflict with them."""
