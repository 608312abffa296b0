"""Imports go one way: cli → decorators, runtime → decorators."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.cluster import REPO

ROOMS = {"decorators": "llmrun", "cli": "llmrun_cli", "runtime": "llmrun_runtime"}
MAY_IMPORT = {"decorators": {"llmrun"}, "cli": {"llmrun", "llmrun_cli"}, "runtime": {"llmrun", "llmrun_runtime"}}


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.partition(".")[0] for name in names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_rooms(room: str) -> None:
    files = list((REPO / room / ROOMS[room]).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & set(ROOMS.values()) <= MAY_IMPORT[room], path
        if room == "decorators":
            assert imported(path) & {"ray", "vllm", "torch", "typer", "httpx"} == set(), path
