"""Says in one sentence what is wrong with a request: pydantic lists every member of every union. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Loc = tuple[str | int, ...]
# Fields by which the members of a union differ.
TAGS = ("role", "type")
_INPUT = re.compile(r"^Input should be ")
_PREFIXES = re.compile(r"^(Value|Assertion) error, ")


def explain(errors: Sequence[Mapping[str, Any]], body: Any = None) -> tuple[str, str]:
    """Return one sentence, and the field that it is about, like `messages[1].content`; "" if it is about none.

    `errors`: pydantic's. `body`: what was validated. Of a union's members, the one that was probably meant counts:
    its tag fits, then its error is the deepest, then it has the fewest errors.
    """
    members: dict[str, list[tuple[Loc, Mapping[str, Any]]]] = {}
    for error in errors:
        path, member = _split(error, body)
        members.setdefault(member, []).append((path, error))
    if not members:
        return "the request is not valid", ""

    def fit(found: list[tuple[Loc, Mapping[str, Any]]]) -> tuple[int, int, int]:
        return sum(_is_tag(path, error) for path, error in found), -max(len(path) for path, _ in found), len(found)

    meant = min(members.values(), key=fit)
    path, error = min(meant, key=lambda each: (_is_tag(*each), -len(each[0])))
    field, message = _dotted(path), str(error.get("msg", "is not valid"))
    if error.get("type") == "missing":
        return f"{field!r} is required", field
    if _PREFIXES.match(message):
        return _PREFIXES.sub("", message), field
    return f"{field!r} {_INPUT.sub('should be ', message)}" if _INPUT.match(message) else f"{field!r}: {message}", field


def _split(error: Mapping[str, Any], body: Any) -> tuple[Loc, str]:
    """Split an error's location into the path in the body, and the member of the outermost union."""
    loc: Loc = tuple(error.get("loc", ()))
    loc = loc[1:] if loc[:1] == ("body",) else loc
    if body is not None and loc and isinstance(loc[0], int):  # pydantic validates iterables later, without their place
        loc = (*_place_of(error.get("input"), loc, body), *loc)
    path: list[str | int] = []
    member, value = "", body
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        if isinstance(value, dict) and (part in value or (is_last and error.get("type") == "missing")):
            path.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
        elif body is None and (isinstance(part, int) or part.islower()):
            path.append(part)
        else:
            member = member or str(part)
    return tuple(path), member


def _place_of(value: Any, loc: Loc, body: Any) -> Loc:
    """Return the path of the list in the body whose item `loc[0]` is, or has, the invalid value; () if none does."""
    places: list[tuple[Loc, Any]] = [((), body)]
    while places:
        place, found = places.pop()
        items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        for key, item in items:
            if isinstance(found, list) and key == loc[0] and (item == value or _has(item, value)):
                return place
            places.append(((*place, key), item))
    return ()


def _has(item: Any, value: Any) -> bool:
    return isinstance(item, dict) and any(each == value or _has(each, value) for each in item.values())


def _is_tag(path: Loc, error: Mapping[str, Any]) -> bool:
    """Whether the error says that another member of the union was meant."""
    return bool(path) and path[-1] in TAGS and error.get("type") in ("literal_error", "enum", "missing")


def _dotted(path: Loc) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
