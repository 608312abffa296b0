"""Reads the error responses of engines: every engine has its own shape, and clients act on OpenAI's codes. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmrun_runtime.ingress.error_shapes import is_anthropic
from llmrun_runtime.ingress.errors import HTTPError

# Larger error responses are cut.
MAX_ERROR_BYTES = 2**16
MAX_MESSAGE = 2000
CONTEXT_LENGTH = "context_length_exceeded"
# OpenAI's `type` and a `code`, by status, for engines that send only a number.
_KINDS = {
    400: ("invalid_request_error", "invalid_request"),
    404: ("invalid_request_error", "not_found"),
    413: ("invalid_request_error", "body_too_large"),
    422: ("invalid_request_error", "invalid_request"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("service_unavailable", "engine_unavailable"),
}
NO_TEMPLATE, NO_TOOLS = "no_chat_template", "tools_not_enabled"
OTHER = "engine_error"
CODES = {CONTEXT_LENGTH, NO_TEMPLATE, NO_TOOLS, OTHER, *(code for _, code in _KINDS.values())}
"""All codes that this module gives to errors."""
_OPENAI_WORD = re.compile(r"[a-z]+(_[a-z]+)*")
# vLLM appends these to its messages: `(parameter=n, value=2)`.
_DETAILS, _PARAMETER = "(parameter=", re.compile(r"[\w.\[\]]+")
_CONTEXT = re.compile(r"maximum context length is (\d+) tokens")
_PROMPT = re.compile(r"contains (?:at least )?(\d+) input tokens")
_TOO_MANY = re.compile(r"max_\w+=(\d+) cannot be greater than max_model_len=(\d+)")
_NO_TEMPLATE = re.compile(r"default chat template is no longer allowed|chat template to be used|no chat template")
_NO_TOOLS = re.compile(r"requires --enable-auto-tool-choice")
_PROMPTS = {
    "/v1/chat/completions": "messages",
    "/v1/messages": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
}


def engine_error(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes, path: str) -> HTTPError:
    """Return an engine's error response (a status of 400 or more) as an error with OpenAI's type and code."""
    found = _fields(body)
    status = 400 if status == 501 else status  # "not implemented": clients retry what has 5xx
    kind, code = _KINDS.get(status, ("invalid_request_error" if status < 500 else "internal_error", OTHER))
    if _is_word(found.get("code")):
        code = found["code"]
    if _is_word(found.get("type")) and found["type"] != "error":
        kind = found["type"]
    message = _text(found.get("message")) or body.decode(errors="replace").strip() or f"the engine answered {status}"
    param = found.get("param") if isinstance(found.get("param"), str) else None
    details = message.rfind(_DETAILS, 0, 2 * MAX_MESSAGE)
    if details >= 0 and (parameter := _PARAMETER.match(message, details + len(_DETAILS))):
        message, param = message[:details].rstrip(), param or parameter[0]
    message, param = message[:MAX_MESSAGE], param and param.removeprefix("body.")
    error = HTTPError(status, message, code, kind, param, _retry_after(headers))
    return _known(error, path)


def _known(error: HTTPError, path: str) -> HTTPError:
    """Give an error that clients act on the code, or the words, by which they know it."""
    if context := _CONTEXT.search(error.message):
        error.code, error.param = CONTEXT_LENGTH, _PROMPTS.get(path)
        if is_anthropic(path):
            tokens = _PROMPT.search(error.message)
            size = f"{tokens[1]} tokens > {context[1]} maximum" if tokens else error.message
            error.message = f"prompt is too long: {size}"
    elif (wanted := _TOO_MANY.search(error.message)) and is_anthropic(path):
        error.param = "max_tokens"
        error.message = (
            f"max_tokens: {wanted[1]} > {wanted[2]}, which is the maximum number of tokens of this model. Lower it"
        )
    elif _NO_TEMPLATE.search(error.message):
        error.code = NO_TEMPLATE
        error.message = (
            'the model has no chat template. Set one in @llm, engine_args={"chat_template": "FILE.jinja"}, or send a '
            "prompt to /v1/completions"
        )
    elif _NO_TOOLS.search(error.message):
        error.code, error.param = NO_TOOLS, "tools"
        error.message = (
            "tools are not enabled for this model: how it calls them is not known. Set its parser in @llm, "
            'engine_args={"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}, for example'
        )
    return error


def _fields(body: bytes) -> Mapping[str, Any]:
    """Return the `message`, `type`, `code` and `param` of an error response, as far as it has them."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(parsed, dict):
        return {}
    error = parsed.get("error", parsed)
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    return error if "message" in error else error | {"message": error.get("detail")}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) if value else ""


def _is_word(value: Any) -> bool:
    """Whether it is written as OpenAI's types and codes are."""
    return isinstance(value, str) and bool(_OPENAI_WORD.fullmatch(value))


def _retry_after(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    value = next((value for name, value in headers if name.lower() == b"retry-after"), b"")
    return int(value) if value.isdigit() else None
