"""Merges pages in Prometheus' text format. Parses no more than it needs: an engine's page has a thousand lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

COMMENTS = ("# HELP ", "# TYPE ")
LABEL = re.compile(r'(\w+)(="(?:[^"\\]|\\.)*")')


@dataclass
class Family:
    """The lines of one metric name, which a page must keep together."""

    comments: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


def merge(pages: Iterable[tuple[str, Mapping[str, str]]]) -> str:
    """Merge the pages, and add labels to each. A label that a page already has is renamed to `exported_…`."""
    families: dict[str, Family] = {}
    for text, labels in pages:
        _add_page(families, text, labels)
    lines: list[str] = []
    for family in families.values():
        lines += [*family.comments.values(), *family.samples]
    return "\n".join([*lines, ""]) if lines else ""


def _add_page(families: dict[str, Family], text: str, labels: Mapping[str, str]) -> None:
    extra = ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())
    name, family = "", Family()
    for line in text.split("\n"):
        if line.startswith(COMMENTS):
            name = line.split(" ", 3)[2]
            family = families.setdefault(name, Family())
            family.comments.setdefault(line[:6], line)
        elif line and not line.startswith("#"):
            if not name or not line.startswith(name):
                name = re.split(r"[{ ]", line, maxsplit=1)[0]
                family = families.setdefault(name, Family())
            family.samples.append(_with_labels(line, extra, labels) if labels else line)


def _with_labels(line: str, extra: str, labels: Iterable[str]) -> str:
    name, brace, rest = line.partition("{")
    if not brace:
        name, _, value = line.partition(" ")
        return f"{name}{{{extra}}} {value}"
    comma = "" if rest.startswith("}") else ","
    if any(f'{label}="' in rest for label in labels):
        rest = LABEL.sub(lambda label: f"exported_{label[0]}" if label[1] in labels else label[0], rest)
    return f"{name}{{{extra}{comma}{rest}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
