"""Serve models in your own Serve application, without llmrun's control and ingress (docs/how-to/from-python.md)."""

from llmrun_runtime.builders.app import build_llm_deployment, build_openai_app
from llmrun_runtime.builders.ingress import OpenAIIngress
from llmrun_runtime.builders.server import LLMServer

__all__ = ["LLMServer", "OpenAIIngress", "build_llm_deployment", "build_openai_app"]
