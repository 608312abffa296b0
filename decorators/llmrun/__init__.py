"""llmrun: serve LLMs on machines that you own.

from llmrun import llm

@llm("org/model")
class Assistant: ...
"""

from llmrun.decorator import llm
from llmrun.errors import LLMRunError, SpecError
from llmrun.lora import LoRA
from llmrun.spec import Secret
from llmrun.weights import Weights

__all__ = ["LLMRunError", "LoRA", "Secret", "SpecError", "Weights", "__version__", "llm"]
__version__ = "0.1.0"
