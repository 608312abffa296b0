"""Says in one sentence what is wrong with a request: pydantic lists every member of every union. Pure."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Loc = tuple[str | int, ...]
# A small body can have errors by the thousand: those of its first items say enough.
MAX_ERRORS = 500
# Objects and arrays of a body, when the place of an error is searched.
MAX_SEARCHED = 2000
# Fields by which the members of a union differ.
TAGS = (("role",), ("type",))
_FIELD = re.compile(r"[a-z_]+")
_LISTS = {"ChatCompletionContentPart": ("content",), "ChatCompletionMessage": ("tool_calls",)}
_INPUT = re.compile(r"^Input should be ")
_PREFIXES = re.compile(r"^(Value|Assertion) error, ")


@dataclass(frozen=True)
class _Error:
    """One of pydantic's errors: where it is in the body, and in which members of unions."""

    path: Loc
    members: tuple[str, ...]
    kind: str
    message: str
    value: Any
    """What is not valid."""

    @property
    def is_tag(self) -> bool:
        """Whether it says that another member of the union was meant."""
        return self.path[-1:] in TAGS and self.kind in ("literal_error", "enum", "missing")


def explain(errors: Sequence[Mapping[str, Any]], body: Any = None) -> tuple[str, str]:
    """Return one sentence, and the field that it is about, like `messages[1].content`; "" if it is about none.

    `errors`: pydantic's. `body`: what was validated. Of a union's members, the one that was probably meant counts:
    its tag fits, then its error is the deepest, then it has the fewest errors.
    """
    read = [_read(error, body) for error in errors[:MAX_ERRORS]]
    if not read:
        return "the request is not valid", ""
    counts, others = Counter(error.members for error in read), Counter(error.members for error in read if error.is_tag)

    def fit(error: _Error) -> tuple[int, int, int]:
        above = (error.members[:length] for length in range(len(error.members) + 1))
        return sum(others[members] for members in above), -len(error.path), counts[error.members]

    meant = min(read, key=fit)
    path, message = meant.path, meant.message
    if path and isinstance(path[0], int):  # pydantic validates iterables later, without their place
        path = (*(_usual_place(meant) if body is None else _place_of(meant, body)), *path)
    field = _dotted(path)
    if meant.kind == "missing":
        return f"{field!r} is required", field
    if _PREFIXES.match(message):
        return _PREFIXES.sub("", message), field
    return f"{field!r} {_INPUT.sub('should be ', message)}" if _INPUT.match(message) else f"{field!r}: {message}", field


def _read(error: Mapping[str, Any], body: Any) -> _Error:
    loc: Loc = tuple(error.get("loc", ()))
    loc = loc[1:] if loc[:1] == ("body",) else loc
    kind = str(error.get("type", ""))
    if loc and isinstance(loc[0], int):
        body = None
    path: list[str | int] = []
    members: list[str] = []
    value = body
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        if isinstance(value, Mapping) and (part in value or (is_last and kind == "missing")):
            path.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
        elif body is None and (isinstance(part, int) or _FIELD.fullmatch(part)):
            path.append(part)
        else:
            members.append(str(part))
    return _Error(tuple(path), tuple(members), kind, str(error.get("msg", "is not valid")), error.get("input"))


def _usual_place(error: _Error) -> Loc:
    """Return the name of the list that vLLM validates, by its items' class."""
    return next((name for part in error.members for prefix, name in _LISTS.items() if part.startswith(prefix)), ())


def _place_of(error: _Error, body: Any) -> Loc:
    """Return the path of the list in the body whose item is, or has, the invalid value; () if it is not soon found."""
    value, places = error.value, deque[tuple[Loc, Any]]([((), body)])
    for _ in range(MAX_SEARCHED):
        if not places:
            break
        place, found = places.popleft()
        items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        for key, item in items:
            if isinstance(found, list) and key == error.path[0] and (item == value or _has(item, value)):
                return place
            if isinstance(item, dict | list):
                places.append(((*place, key), item))
    return ()


def _has(item: Any, value: Any) -> bool:
    return isinstance(item, dict) and any(each == value or _has(each, value) for each in item.values())


def _dotted(path: Loc) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
