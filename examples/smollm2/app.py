"""A 135M model that answers on a laptop's CPU: `llmrun deploy` this file.

`just demo` needs no network: it makes the weights and imports them under the name that stands here.
"""

from llmrun import llm


@llm("HuggingFaceTB/SmolLM2-135M-Instruct", name="smollm2", aliases=["HuggingFaceTB/SmolLM2-135M-Instruct"])
class SmolLM2: ...
