"""How many tokens a request may generate, and the caps on that. Pure.

A request may generate its `max_tokens` for each of its choices and prompts. A cap (`max_output_tokens` of a model or a
key) is compared with all of them together, and set where a request states less or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmrun_runtime.ingress.errors import HTTPError

# By path, the fields with the tokens of one choice. The first is the one that every engine reads.
FIELDS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
CHOICES = ("n", "best_of")
# Paths that generate nothing. They answer JSON even if a request says `"stream": true`, which their engines ignore.
WITHOUT_TEXT = frozenset(
    {
        *("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
        *("/tokenize", "/detokenize", "/v1/messages/count_tokens"),
    }
)
# Those, and the paths that generate nothing longer than the audio that they get.
WITHOUT_OUTPUT = WITHOUT_TEXT | {"/v1/audio/transcriptions", "/v1/audio/translations"}


@dataclass(frozen=True)
class Wanted:
    """What a request says about its output."""

    choices: int = 1
    """Of all its prompts together."""
    tokens: Mapping[str, int] | None = None
    """The tokens of each choice, by field; None for a body that is no JSON."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> Wanted:
        """Read it from a JSON body. What no engine accepts counts as not stated."""
        prompts = max(1, _count(body.get("prompt")) + _count(body.get("prompt_embeds")))
        choices = max(1, *(_number(body.get(name)) for name in CHOICES))
        names = {name for names in FIELDS.values() for name in names}
        stated = {name: _number(body[name]) for name in names if body.get(name) is not None}
        return Wanted(choices * prompts, stated)

    def total(self, path: str) -> int:
        """Return the tokens that it may generate; 0 if it does not state them."""
        return self.choices * max((self._stated(name) for name in FIELDS.get(path, ())), default=0)

    def _stated(self, name: str) -> int:
        return (self.tokens or {}).get(name, 0)


UNKNOWN = Wanted()


@dataclass(frozen=True)
class OutputCap:
    """The largest number of tokens that one request may generate, and whose cap it is."""

    tokens: int
    label: str

    def apply(self, path: str, wanted: Wanted) -> tuple[str, int] | None:
        """Return the field and the value to set in the request's body; None if it generates nothing.

        Raises HTTPError (400) if it wants more, or if its output cannot be capped.
        """
        if path in WITHOUT_OUTPUT:
            return None
        if path not in FIELDS or wanted.tokens is None:
            message = f"{path} with this body has no limit of its output, which {self.label} requires"
            raise HTTPError(400, message, "output_not_limited")
        field, each = FIELDS[path][0], self.tokens // wanted.choices
        total = wanted.total(path)
        if total > self.tokens or not each:
            asked = f"{total // wanted.choices} tokens for each of {wanted.choices}" if total else str(wanted.choices)
            message = (
                f"this request may generate too much: {self.label} allows {self.tokens} tokens in all, and it asks for "
                f"{asked} choices. Lower {field!r} or 'n'"
            )
            raise HTTPError(400, message, "output_too_long", param=field)
        return field, total // wanted.choices or each


def with_field(body: bytes, name: str, value: int) -> bytes:
    """Return a JSON object with this field, over one of the same name: of two, every parser takes the last."""
    encoding = json.detect_encoding(body)
    text = body if encoding == "utf-8" else body.decode(encoding).encode()
    return text.rstrip()[:-1] + f', "{name}": {value}}}'.encode()


def _count(prompt: Any) -> int:
    """Return the number of prompts: a list of texts or of lists of token ids is a batch."""
    is_batch = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    return len(prompt) if is_batch else prompt is not None


def _number(value: Any) -> int:
    """Return an integer as lenient parsers read it; 0 if it is none."""
    try:
        return max(0, int(value)) if isinstance(value, int | float | str) else 0
    except (ValueError, OverflowError):
        return 0
