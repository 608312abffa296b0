"""Finds text that cannot be encoded: no engine can read it, and each fails in another way. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

from llmrun_runtime.ingress.errors import HTTPError

_Place = tuple[Any, str | int] | None
"""The place of the surrounding object or array, and a key or an index. As text, each would take its whole length."""

MAX_SHOWN = 200

# Half of a surrogate pair, escaped or as bytes: only then the whole body is searched.
_SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(body: bytes, parsed: Any) -> None:
    """Raise HTTPError (400) if a text in the body, or a key, has half of a surrogate pair."""
    is_plain = b"\\u" not in body and b"\xed" not in body  # the pattern takes ten times as long
    if json.detect_encoding(body) == "utf-8" and (is_plain or not _SUSPECT.search(body)):
        return
    places: list[tuple[_Place, Any]] = [(None, parsed)]
    while places:
        place, value = places.pop()
        if isinstance(value, str) and (found := _LONE_SURROGATE.search(value)):
            field, code = _shown(place), f"U+{ord(found[0]):04X}"
            message = f"{field!r} has half of a surrogate pair ({code}), which is no text. Send valid Unicode"
            raise HTTPError(400, message, "invalid_text", param=field)
        if isinstance(value, dict):
            places += [((place, key), item) for key, item in value.items()]
            places += [((place, key), key) for key in value]
        elif isinstance(value, list):
            places += [((place, index), item) for index, item in enumerate(value)]


def _shown(place: _Place) -> str:
    """Return a place in the body as text, like `messages[0].content`; its end, if that is long."""
    parts: list[str] = []
    while place:
        place, part = place
        parts.append(f"[{part}]" if isinstance(part, int) else f".{part[-MAX_SHOWN:]}")
    text = "".join(reversed(parts[:MAX_SHOWN])).lstrip(".")[-MAX_SHOWN:]
    return text.encode(errors="backslashreplace").decode()
