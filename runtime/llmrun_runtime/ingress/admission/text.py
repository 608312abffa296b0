"""Finds text that cannot be encoded: no engine can read it, and each fails in another way. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

from llmrun_runtime.ingress.errors import HTTPError

# Half of a surrogate pair, escaped or as bytes: only then the whole body is searched.
_SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(body: bytes, parsed: Any) -> None:
    """Raise HTTPError (400) if a text in the body, or a key, has half of a surrogate pair."""
    if json.detect_encoding(body) == "utf-8" and not _SUSPECT.search(body):
        return
    places: list[tuple[str, Any]] = [("", parsed)]
    while places:
        place, value = places.pop()
        if isinstance(value, str) and (found := _LONE_SURROGATE.search(value)):
            code = f"U+{ord(found[0]):04X}"
            message = f"{place!r} has half of a surrogate pair ({code}), which is no text. Send valid Unicode"
            raise HTTPError(400, message, "invalid_text", param=place)
        if isinstance(value, dict):
            places += [(f"{place}.{_shown(key)}".lstrip("."), item) for key, item in value.items()]
            places += [(f"{place}.{_shown(key)}".lstrip("."), key) for key in value]
        elif isinstance(value, list):
            places += [(f"{place}[{index}]", item) for index, item in enumerate(value)]


def _shown(key: str) -> str:
    return key.encode(errors="backslashreplace").decode()
