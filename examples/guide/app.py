"""The features of Ray Serve LLM's guide in one app: `llmrun deploy app.py --lazy`, then run the other files here.

Set MODEL, EMBEDDER and EYES to use other weights, and ADAPTERS to a folder or bucket of LoRA adapters.
"""

import os

from llmrun import LoRA, llm

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")


@llm(
    MODEL,
    name="talker",
    cpus=0.2,
    max_replicas=2,
    target_ongoing_requests=16,
    idle_timeout=600,
    # llmrun detects the parser from common chat templates; this one is set explicitly.
    engine_args="--max-model-len 2048 --enable-auto-tool-choice --tool-call-parser hermes",
)
class Talker: ...


@llm(os.environ.get("EMBEDDER", "sentence-transformers/all-MiniLM-L6-v2"), name="vectors", task="embed", cpus=0.2)
class Vectors: ...


@llm(os.environ.get("EYES", "HuggingFaceTB/SmolVLM-256M-Instruct"), name="eyes", cpus=0.2)
class Eyes: ...


@llm(MODEL, name="adapted", cpus=0.2, lora=LoRA(os.environ.get("ADAPTERS", "s3://acme/adapters"), max_loaded=2))
class Adapted: ...
