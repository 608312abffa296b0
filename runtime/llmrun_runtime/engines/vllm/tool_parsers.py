"""Selects vLLM's tool-call parser for a model, by the chat template that instructs the model how to call tools.

Based on vLLM's list of models (docs.vllm.ai, features/tool_calling) and their templates. Other models get no parser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# By `model_type` of config.json, for models whose templates do not identify the parser.
BY_TYPE = {"gpt_oss": "openai", "llama4": "llama4_pythonic", "granite": "granite", "granitemoe": "granite"}
# Substrings that must all be in the template; the first match wins.
BY_TEMPLATE = (
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>",), "llama3_json"),
    (("<|tool|>", "<|/tool|>"), "phi4_mini_json"),
)


def tool_parser(weights: Path) -> str:
    """Return the name of the parser for the model in this folder; "" if none is known."""
    template = chat_template(weights)
    if "tools" not in template:
        return ""
    kind = BY_TYPE.get(str(_read_json(weights / "config.json").get("model_type")))
    return kind or next((name for marks, name in BY_TEMPLATE if all(mark in template for mark in marks)), "")


def chat_template(weights: Path) -> str:
    """Return the model's chat template, or several joined; "" if it has none."""
    try:
        return (weights / "chat_template.jinja").read_text()
    except (OSError, UnicodeDecodeError):
        template = _read_json(weights / "tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):
        return "\n".join(str(item.get("template", "")) for item in template if isinstance(item, dict))
    return template if isinstance(template, str) else ""


def _read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object; {} for an invalid file, which the engine will report."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
