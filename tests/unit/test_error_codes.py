"""The reference page of the endpoint lists every error code in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from llmrun_runtime.ingress import engine_errors
from tests.support.cluster import REPO

RUNTIME = REPO / "runtime" / "llmrun_runtime"
# The position of the argument `code`.
CALLS = {"HTTPError": 2, "send_error": 4, "error_body": 2}
# These define the functions above, and pass their callers' codes on.
DEFINITIONS = {RUNTIME / "asgi.py", RUNTIME / "ingress" / "errors.py", RUNTIME / "ingress" / "engine_errors.py"}
PAGES = (REPO / "docs" / "reference" / "endpoint.md", REPO / "docs" / "endpoint.md")


def code_arguments(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the argument `code` of each call of a function in CALLS."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            keywords = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            yield keywords[0] if keywords else node.args[CALLS[node.func.id]]


def assigned_to(name: str, tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the values that are assigned to a name anywhere in a file, also as part of a tuple."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id == name:
                yield node.value
            elif isinstance(target, ast.Tuple):
                names = [each.id if isinstance(each, ast.Name) else "" for each in target.elts]
                choices = [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
                for choice in choices:
                    if name in names and isinstance(choice, ast.Tuple):
                        yield choice.elts[names.index(name)]


def strings(value: ast.expr, tree: ast.AST) -> set[str]:
    """Return the possible values of an expression of constants, conditionals and assigned names."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return {value.value}
    if isinstance(value, ast.IfExp):
        return strings(value.body, tree) | strings(value.orelse, tree)
    if isinstance(value, ast.Name):
        return {text for each in assigned_to(value.id, tree) for text in strings(each, tree)}
    return set()


def error_codes() -> dict[str, Path]:
    """Return every error code in the source, with a file that uses it."""
    constants = ast.parse((RUNTIME / "ingress" / "errors.py").read_text())
    codes = {code: RUNTIME / "ingress" / "engine_errors.py" for code in engine_errors.CODES}
    for path in sorted(RUNTIME.rglob("*.py")):
        if path in DEFINITIONS:
            continue
        tree = ast.parse(path.read_text())
        for argument in code_arguments(tree):
            values = strings(argument, tree) or strings(argument, constants)
            assert values, f"{path}:{argument.lineno}: this test cannot resolve the error code"
            codes |= dict.fromkeys(values, path)
    return codes


def test_the_endpoint_page_lists_every_error_code() -> None:
    page = next(path for path in PAGES if path.exists()).read_text()
    codes = error_codes()
    assert {"invalid_json", "model_not_ready", "adapter_invalid", "adapter_not_ready", "engine_failed"} <= codes.keys()
    for code, path in codes.items():
        assert f"`{code}`" in page, f"{code}, used in {path}"
