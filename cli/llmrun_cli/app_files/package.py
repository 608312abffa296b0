"""Packs an app's folder: the same files give the same bytes, whatever the day."""

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


def pack(folder: Path, leave_out: Collection[Path] = ()) -> tuple[str, bytes]:
    """The zip of `folder` without the paths in `leave_out`, and its sha256.

    Raises AppError above 100 MiB, with the largest files.
    """
    files = sorted(_files(folder, leave_out), key=lambda path: path.relative_to(folder).as_posix())
    sizes = {path: path.stat().st_size for path in files}
    if sum(sizes.values()) > MAX_PACKAGE_BYTES:
        largest = sorted(files, key=lambda path: -sizes[path])[:3]
        named = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 2**20:.0f} MiB)" for path in largest)
        raise AppError(
            f"{folder}: the code would be {sum(sizes.values()) / 2**20:.0f} MiB, over {MAX_PACKAGE_BYTES >> 20}: "
            f"largest are {named}; name what is no code in .llmrunignore"
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


def _files(folder: Path, leave_out: Collection[Path]) -> list[Path]:
    """The folder's files that no ignore file names; each rules its own folder and those below, as git has it."""
    found: list[Path] = []
    rules_above = [(folder, GitIgnoreSpec.from_lines(ALWAYS_IGNORED))]
    repository = next((above for above in folder.parents if (above / ".git").exists()), None)
    for above in folder.parents if repository and not (folder / ".git").exists() else ():
        rules_above += _rules(above)
        if above == repository:
            break

    def walk(here: Path, rules: list[tuple[Path, GitIgnoreSpec]]) -> None:
        rules = [*rules, *_rules(here)]
        for path in sorted(here.iterdir()):
            slash = "/" if path.is_dir() else ""
            if path in leave_out or any(
                spec.match_file(path.relative_to(base).as_posix() + slash) for base, spec in rules
            ):
                continue
            if path.is_dir() and not path.is_symlink():
                walk(path, rules)
            elif path.is_file():
                found.append(path)

    walk(folder, rules_above)
    return found


def _rules(folder: Path) -> list[tuple[Path, GitIgnoreSpec]]:
    """What the folder's own ignore files say."""
    files = [folder / name for name in IGNORE_FILES if (folder / name).is_file()]
    lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    return [(folder, GitIgnoreSpec.from_lines(lines))] if lines else []
