"""Serve LLMs on your own machines.

from llmrun import llm

@llm("org/model")
class Assistant: ...
"""

from llmrun.context import RequestContext
from llmrun.decorator import llm
from llmrun.deployment import Deployment, deploy
from llmrun.errors import LLMRunError, SpecError
from llmrun.lora import LoRA
from llmrun.options import LLMOptions
from llmrun.spec import Secret
from llmrun.weights import Weights

__all__ = [
    "Deployment",
    "LLMOptions",
    "LLMRunError",
    "LoRA",
    "RequestContext",
    "Secret",
    "SpecError",
    "Weights",
    "__version__",
    "deploy",
    "llm",
]
__version__ = "0.1.0"
