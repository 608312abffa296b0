"""A 135M model that answers on a laptop's CPU. `just demo` makes its weights; then `llmrun deploy` this file."""

from llmrun import llm


@llm("./SmolLM2-135M-Instruct", name="smollm2", aliases=["HuggingFaceTB/SmolLM2-135M-Instruct"])
class SmolLM2: ...
