"""Which of vLLM's parsers understands a model's tool calls: told by its chat template, which shows the model how.

From vLLM's list of models (docs.vllm.ai, features/tool_calling) and their templates; what is not told apart gets none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# By `model_type` of config.json, where templates are not like the others'.
BY_TYPE = {"gpt_oss": "openai", "llama4": "llama4_pythonic", "granite": "granite", "granitemoe": "granite"}
# What must all be in the template; the first that fits.
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
    """Its name; "" if none is known for the model in that folder."""
    template = chat_template(weights)
    if "tools" not in template:
        return ""
    kind = BY_TYPE.get(str(_json(weights / "config.json").get("model_type")))
    return kind or next((name for marks, name in BY_TEMPLATE if all(mark in template for mark in marks)), "")


def chat_template(weights: Path) -> str:
    """The model's own; "" if it has none. Of several all together."""
    try:
        return (weights / "chat_template.jinja").read_text()
    except (OSError, UnicodeDecodeError):
        said = _json(weights / "tokenizer_config.json").get("chat_template") or ""
    if isinstance(said, list):
        return "\n".join(str(item.get("template", "")) for item in said if isinstance(item, dict))
    return said if isinstance(said, str) else ""


def _json(file: Path) -> dict[str, Any]:
    """What an engine that cannot read it either will complain of."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
