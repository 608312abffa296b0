"""Packs an app's folder into a zip. The same files give the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Collection
from pathlib import Path

from pathspec import GitIgnoreSpec

from llmrun.errors import AppError
from llmrun.wire import MAX_PACKAGE_BYTES

IGNORE_FILES = (".gitignore", ".llmrunignore")
ALWAYS_IGNORED = ("__pycache__/", "*.pyc", ".git/", ".venv/", "venv/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/")
EPOCH = (1980, 1, 1, 0, 0, 0)
Rules = list[tuple[Path, GitIgnoreSpec]]


def pack(folder: Path, exclude: Collection[Path] = ()) -> tuple[str, bytes]:
    """Return the sha256 and the bytes of a zip of `folder` without the paths in `exclude`.

    Raises AppError above 100 MiB; the message names the largest files.
    """
    files = sorted(_files(folder, exclude), key=lambda path: path.relative_to(folder).as_posix())
    sizes = {path: path.stat().st_size for path in files}
    if (total := sum(sizes.values())) > MAX_PACKAGE_BYTES:
        largest = sorted(files, key=lambda path: -sizes[path])[:3]
        names = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 2**20:.0f} MiB)" for path in largest)
        raise AppError(
            f"{folder}: the code package is {total / 2**20:.0f} MiB; the limit is {MAX_PACKAGE_BYTES >> 20} MiB. "
            f"Largest files: {names}. List files that are not code in .llmrunignore."
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as package:
        for path in files:
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            package.writestr(info, path.read_bytes())
    data = buffer.getvalue()
    return hashlib.sha256(data).hexdigest(), data


def _files(folder: Path, exclude: Collection[Path]) -> list[Path]:
    """Return the folder's files that no ignore file excludes.

    As in git, an ignore file applies to its own folder and those below it.
    """
    files: list[Path] = []
    inherited: Rules = [(folder, GitIgnoreSpec.from_lines(ALWAYS_IGNORED))]
    repository = next((parent for parent in folder.parents if (parent / ".git").exists()), None)
    for parent in folder.parents if repository and not (folder / ".git").exists() else ():
        inherited += _rules(parent)
        if parent == repository:
            break

    def walk(current: Path, rules: Rules) -> None:
        rules = [*rules, *_rules(current)]
        for path in sorted(current.iterdir()):
            slash = "/" if path.is_dir() else ""
            if path in exclude or any(
                spec.match_file(path.relative_to(base).as_posix() + slash) for base, spec in rules
            ):
                continue
            if path.is_dir() and not path.is_symlink():
                walk(path, rules)
            elif path.is_file():
                files.append(path)

    walk(folder, inherited)
    return files


def _rules(folder: Path) -> Rules:
    """Return the rules of the folder's own ignore files."""
    files = [folder / name for name in IGNORE_FILES if (folder / name).is_file()]
    lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    return [(folder, GitIgnoreSpec.from_lines(lines))] if lines else []
