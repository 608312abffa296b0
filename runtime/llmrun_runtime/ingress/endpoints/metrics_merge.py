"""Several of Prometheus' text pages as one. Reads no more of them than that takes: an engine's has a thousand lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

HEADS = ("# HELP ", "# TYPE ")
PAIR = re.compile(r'(\w+)(="(?:[^"\\]|\\.)*")')


@dataclass
class Family:
    """What is said of one name: a page may have it in one place only."""

    heads: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


def merge(pages: Iterable[tuple[str, Mapping[str, str]]]) -> str:
    """The pages as one, with more labels for each. A label that a page has already is called `exported_…` there."""
    families: dict[str, Family] = {}
    for text, labels in pages:
        _take(families, text, labels)
    lines: list[str] = []
    for family in families.values():
        lines += [*family.heads.values(), *family.samples]
    return "\n".join([*lines, ""]) if lines else ""


def _take(families: dict[str, Family], text: str, labels: Mapping[str, str]) -> None:
    more = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    name, family = "", Family()
    for line in text.split("\n"):
        if line.startswith(HEADS):
            name = line.split(" ", 3)[2]
            family = families.setdefault(name, Family())
            family.heads.setdefault(line[:6], line)
        elif line and not line.startswith("#"):
            if not name or not line.startswith(name):
                name = re.split(r"[{ ]", line, maxsplit=1)[0]
                family = families.setdefault(name, Family())
            family.samples.append(_labelled(line, more, labels) if labels else line)


def _labelled(line: str, more: str, labels: Iterable[str]) -> str:
    name, brace, rest = line.partition("{")
    if not brace:
        name, _, value = line.partition(" ")
        return f"{name}{{{more}}} {value}"
    comma = "" if rest.startswith("}") else ","
    if any(f'{label}="' in rest for label in labels):
        rest = PAIR.sub(lambda pair: f"exported_{pair[0]}" if pair[1] in labels else pair[0], rest)
    return f"{name}{{{more}{comma}{rest}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
