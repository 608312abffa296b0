"""Which package and which folder may import which; docs/explanation/architecture.md has the picture."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import REPO

PACKAGES = {"decorators": "llmrun", "cli": "llmrun_cli", "runtime": "llmrun_runtime"}
MAY_IMPORT = {"decorators": {"llmrun"}, "cli": {"llmrun", "llmrun_cli"}, "runtime": {"llmrun", "llmrun_runtime"}}
RUNTIME = REPO / "runtime" / "llmrun_runtime"
# Each folder of the runtime is one process role, or one thing on a node. What two of them exchange is in `wire`.
SHARED = {"actors", "asgi", "http", "http_protocol", "listening", "logs", "metric_labels", "niceness", "placement"}
SHARED |= {"rate_window", "ray_internals", "ray_nodes", "safetensors_files", "supervise"}
FOLDERS = {
    "wire": {"weights"},
    "link": set[str](),
    "weights": set[str](),
    "engines": {"wire", "link"},
    "node": {"engines", "weights", "wire"},
    "replica": {"engines", "node", "weights", "wire"},
    "ingress": {"engines", "link", "wire"},
    "control": {"engines", "node", "replica", "weights", "wire"},
    "cluster": {"control", "engines", "ingress"},
    "builders": {"engines", "ingress", "link", "node", "replica", "weights", "wire"},
}
# Below control: what a folder may import of the others, and of control's own files none but these.
CONTROL = {
    "state": set[str](),
    "catalog": {"state"},
    "autoscaling": {"state"},
    "operations": {"state", "catalog", "autoscaling"},
    "api": {"state"},
}
# Ray is imported where actors, replicas and clusters are; never where engines, weights, wire and the link are.
WITHOUT_RAY = ("engines", "weights", "wire", "link")


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it; `from a import b` counts as `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def folders(path: Path, package: str) -> set[str]:
    """The folders directly below `package` that a file imports from."""
    base = RUNTIME.joinpath(*package.split(".")[1:])
    names = {name.removeprefix(f"{package}.").partition(".")[0] for name in imports(path) if name.startswith(package)}
    return {name for name in names if (base / name).is_dir()}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction(package: str) -> None:
    files = list((REPO / package / PACKAGES[package]).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & set(PACKAGES.values()) <= MAY_IMPORT[package], path
        if package == "decorators":
            assert imported(path) & {"ray", "vllm", "torch", "typer", "httpx"} == set(), path


def test_every_folder_of_the_runtime_has_a_rule() -> None:
    found = {path.name for path in RUNTIME.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == set(FOLDERS)
    assert {path.stem for path in RUNTIME.glob("*.py")} == SHARED | {"__init__"}


@pytest.mark.parametrize("rules", [FOLDERS, CONTROL])
def test_the_rules_have_no_cycle(rules: dict[str, set[str]]) -> None:
    graphlib.TopologicalSorter(rules).prepare()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_the_runtime_imports_only_what_its_rule_allows(folder: str) -> None:
    for path in (RUNTIME / folder).rglob("*.py"):
        assert folders(path, "llmrun_runtime") <= FOLDERS[folder] | {folder}, path
        if folder in WITHOUT_RAY:
            assert "ray" not in imported(path), path


@pytest.mark.parametrize("folder", CONTROL)
def test_a_folder_of_control_imports_only_what_its_rule_allows(folder: str) -> None:
    for path in (RUNTIME / "control" / folder).rglob("*.py"):
        assert folders(path, "llmrun_runtime.control") <= CONTROL[folder] | {folder}, path


@pytest.mark.parametrize("name", sorted(SHARED))
def test_shared_modules_import_no_folder(name: str) -> None:
    assert folders(RUNTIME / f"{name}.py", "llmrun_runtime") == set()


def test_commands_are_not_imported_by_the_library() -> None:
    base = REPO / "cli" / "llmrun_cli"
    for path in base.rglob("*.py"):
        if path.parent.name != "commands" and path.name != "main.py":
            assert not any(name.startswith("llmrun_cli.commands") for name in imports(path)), path


def test_rays_private_modules_are_used_in_one_file() -> None:
    private = ("ray._private", "ray.serve._private", "ray._raylet", "ray.core.generated")
    for path in RUNTIME.rglob("*.py"):
        if path.name != "ray_internals.py":
            assert not any(name.startswith(private) for name in imports(path)), path
