"""A 135M model for a laptop's CPU: `llmrun deploy app.py`.

`just demo` needs no network: it creates the weights and imports them under this model's name.
"""

from llmrun import llm


@llm("HuggingFaceTB/SmolLM2-135M-Instruct", name="smollm2", aliases=["HuggingFaceTB/SmolLM2-135M-Instruct"])
class SmolLM2: ...
