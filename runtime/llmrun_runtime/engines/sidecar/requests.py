"""What a sidecar refuses of a request: media that the server would fetch or open, and the caller's own template.

Such servers take any URL, follow redirects, and open what looks like a path on their node: transformers 5.19's
`load_image`, `load_audio` and `load_video`; SGLang's `load_image`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import urlsplit

# They contain no media: schemas whose properties may have any name, arguments of a tool's call, and plain data.
NO_MEDIA = frozenset(
    {"tools", "functions", "response_format", "text_format", "tool_calls", "metadata", "arguments", "json_schema"}
)
# Content parts, by type, with no media: what a tool is called with.
CALLS = ("tool_use", "function_call")
MEDIA = re.compile(r"(^|_)(image|video|audio|file|media)s?(_|$)|^(url|uri|path|source)$")
# Names of files are shorter (PATH_MAX in Linux's limits.h).
MAX_PATH = 4096
BASE64 = re.compile(r"[A-Za-z0-9+/=_-]+")
# An encoding or a kind of media, not a place.
HARMLESS = frozenset({"detail", "format", "media_type", "type", "file_name", "filename", "voice"})


def problem(payload: Any, hosts: Collection[str]) -> str:
    """Return why a request is refused, for its caller; "" if it is not. `hosts`: from which media may be fetched."""
    if not isinstance(payload, dict):
        return ""
    templates = (payload, payload.get("chat_template_kwargs"))
    if any(isinstance(part, dict) and part.get("chat_template") is not None for part in templates):
        return "chat_template: the model's own is used. Remove it from the request"
    for place in _media(payload, ""):
        if (cause := _refusal(place, hosts)) is not None:
            shown = place if len(place) < 100 else place[:100] + "…"
            return f"{shown!r}: {cause}. Send the media itself, as a data: URL"
    return ""


def _refusal(place: str, hosts: Collection[str]) -> str | None:
    """Return why media are not loaded from this place; None if they are."""
    if place[:5].lower() == "data:" or (len(place) > MAX_PATH and BASE64.fullmatch(place)):
        return None
    try:
        url = urlsplit(place)
        host = url.hostname or ""
    except ValueError:
        return "it is no URL"
    if url.scheme not in ("http", "https"):
        return "media are loaded from no files"
    if host in hosts:
        return None
    return f"media are not fetched from {host}; the model's engine_args allowed_media_domains=[…] names hosts"


def _media(value: Any, name: str) -> Iterator[str]:
    """Yield the strings that say where media are: everything under a name of MEDIA. Without recursion: any depth."""
    todo: list[tuple[Any, bool]] = [(value, bool(MEDIA.search(name)))]
    while todo:
        item, is_media = todo.pop()
        if isinstance(item, str) and is_media:
            yield item
        elif isinstance(item, list):
            todo += ((part, is_media) for part in item)
        elif isinstance(item, dict) and item.get("type") not in CALLS:
            for key, part in item.items():
                if key not in NO_MEDIA and key not in HARMLESS:
                    todo.append((part, is_media or bool(MEDIA.search(key))))
