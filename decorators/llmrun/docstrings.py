"""Reads descriptions from docstrings, so that each option is described once: where an IDE shows it."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap


def attribute_docstrings(cls: type) -> dict[str, str]:
    """Return the strings under the annotated attributes of `cls`, each as one line; {} if the source is not available.

    Python keeps no such strings at run time, so they are read from the source.
    """
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):
        return {}
    assert isinstance(definition, ast.ClassDef)
    descriptions = {}
    for attribute, below in itertools.pairwise(definition.body):
        match attribute, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                descriptions[name] = " ".join(text.split())
    return descriptions


def argument_docstrings(documented: object) -> dict[str, str]:
    """Return the descriptions in the `Args:` section of a docstring, each as one line."""
    section = (inspect.getdoc(documented) or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    descriptions: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 4:
            name, _, descriptions[name] = line.strip().partition(": ")
        elif name and line.strip():
            descriptions[name] += " " + line.strip()
    return descriptions
