"""Engines: the processes that speak OpenAI HTTP, and what llmrun puts inside them."""
