"""The models of the other examples in this folder. Set `MODEL` to use other weights than SmolLM2's."""

import os
from typing import Any

from llmrun import llm

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")


@llm(MODEL, accelerator="cpu", cpus=0.2, aliases=["acme/assistant"])
class Assistant: ...


@llm(MODEL, accelerator="cpu", cpus=0.2)
class Short:
    """Limits every answer to three tokens with a hook."""

    def on_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request | {"max_tokens": 3}
