"""The commands of `llmrun`."""
