"""Two models, for the examples beside this file. `MODEL` names other weights than SmolLM2's."""

import os
from typing import Any

from llmrun import llm

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")


@llm(MODEL, accelerator="cpu", cpus=0.2, aliases=["acme/assistant"])
class Assistant: ...


@llm(MODEL, accelerator="cpu", cpus=0.2)
class Short:
    """Answers with few tokens, whatever was asked for: a hook sees to it."""

    def on_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request | {"max_tokens": 3}
