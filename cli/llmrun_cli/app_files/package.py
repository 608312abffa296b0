"""Packs an app's folder into a zip. The same files give the same bytes.

A package goes to the cluster's database and to every node, so secrets never become part of it.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from llmrun.errors import AppError
from llmrun.wire import MAX_PACKAGE_BYTES

IGNORE_FILES = (".gitignore", ".llmrunignore")
ALWAYS_IGNORED = ("__pycache__/", "*.pyc", ".git/", ".venv/", "venv/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/")
# Nothing takes these along: no rule of an ignore file can include them again.
SECRETS = (
    *(".env", ".env.*", "!.env.example", "!.env.sample", "!.env.template", ".envrc", ".netrc", "_netrc", ".pgpass"),
    *(".npmrc", ".pypirc", ".git-credentials", ".boto", ".s3cfg", ".htpasswd", ".vault-token"),
    *(".ssh/", ".aws/", ".azure/", ".config/gcloud/", ".docker/", ".gnupg/", ".huggingface/", ".kube/", ".modal.toml"),
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx"),
    *(
        "application_default_credentials.json",
        "client_secret*.json",
        "*service-account*.json",
        "*service_account*.json",
    ),
)
# Of an LLMRUN_HOME, whatever its name: such a folder is left out.
HOME_FILES = ("admin.key", "ray.token", "cluster.json")
# What engines import, also late.
ENGINE_MODULES = frozenset({"fastapi", "llmrun", "numpy", "pydantic", "ray", "torch", "transformers", "vllm"})
EPOCH = (1980, 1, 1, 0, 0, 0)
Rules = list[tuple[Path, GitIgnoreSpec]]


@dataclass(frozen=True)
class CodePackage:
    """A zip with code."""

    digest: str
    """The sha256 of `data`, in hexadecimal."""
    data: bytes
    files: tuple[str, ...]
    """The names in the zip, relative to the folder."""
    secrets: tuple[str, ...]
    """What was left out because it may contain secrets, relative to the folder; a folder ends in a slash."""


def pack(folder: Path, exclude: Collection[Path] = ()) -> CodePackage:
    """Pack `folder` without the paths in `exclude`, without secrets and without what its ignore files name.

    Raises AppError if the folder is or contains the user's home folder, if a link leads out of it, and above 100 MiB;
    that message names the largest files.
    """
    home = Path.home().resolve()
    if home.is_relative_to(folder.resolve()):
        raise AppError(
            f"{folder}: the code package would contain your home folder ({home}): an app file with hooks takes its "
            "whole folder along. Move the app file into a folder of its own."
        )
    found, secrets = _files(folder, exclude)
    files = sorted(found, key=lambda path: path.relative_to(folder).as_posix())
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
    packed = tuple(path.relative_to(folder).as_posix() for path in files)
    return CodePackage(hashlib.sha256(data).hexdigest(), data, packed, tuple(secrets))


def hidden_modules(package: CodePackage) -> list[str]:
    """Return warnings about modules of the app that share their name with one of Python's library, or an engine's.

    Whichever is imported first counts: in `python app.py` that is often the app's, beside an engine the other one.
    """
    tops = sorted({name.removesuffix(".py") for name in package.files if name.endswith(".py") and "/" not in name})
    return [
        f"{top}.py has the name of a module of Python's library or of the engine. Rename it: which of the two is "
        f"imported depends on the order"
        for top in tops
        if top in sys.stdlib_module_names or top in ENGINE_MODULES
    ]


def _files(folder: Path, exclude: Collection[Path]) -> tuple[list[Path], list[str]]:
    """Return the folder's files that no ignore file excludes, and what was left out because it may contain secrets.

    As in git, an ignore file applies to its own folder and those below it. Raises AppError if a link leads out.
    """
    files: list[Path] = []
    secrets: list[str] = []
    is_secret, top = GitIgnoreSpec.from_lines(SECRETS), folder.resolve()
    inherited: Rules = [(folder, GitIgnoreSpec.from_lines(ALWAYS_IGNORED))]
    repository = next((parent for parent in folder.parents if (parent / ".git").exists()), None)
    for parent in folder.parents if repository and not (folder / ".git").exists() else ():
        inherited += _rules(parent)
        if parent == repository:
            break

    excluded = {path.resolve() for path in exclude}

    def refuse_link(path: Path, target: Path, parents: tuple[Path, ...]) -> None:
        """Raise AppError for a link to what is left out at its own place, or to a folder that is being walked."""
        if target in parents:
            raise AppError(f"{path}: the link leads to a folder that contains it, {target}. List it in .llmrunignore.")
        rules, place = inherited, folder
        for part in target.relative_to(top).parts:
            rules, place = [*rules, *_rules(place)], place / part
            if _matches(place, rules):
                raise AppError(
                    f"{path}: the link leads to {target}, which an ignore file leaves out. List the link there, too."
                )

    def walk(current: Path, rules: Rules, parents: tuple[Path, ...]) -> None:
        rules = [*rules, *_rules(current)]
        parents = (*parents, current.resolve())
        for path in sorted(current.iterdir()):
            slash = "/" if path.is_dir() else ""
            if path in exclude or _matches(path, rules):
                continue
            if not path.exists():  # a link to nothing
                continue
            name = path.relative_to(folder).as_posix() + slash
            target = path.resolve()
            if not target.is_relative_to(top):
                raise AppError(
                    f"{path}: the link leads out of the app's folder, to {target}. Replace it by a copy, or list it in "
                    ".llmrunignore."
                )
            # A link may have a harmless name: look at what it leads to, too.
            inside = [path, *(place for place in (target, *target.parents) if place.is_relative_to(top))]
            if any(is_secret.match_file(of) for of in (name, target.relative_to(top).as_posix() + slash)) or any(
                (place / file).is_file() for place in inside for file in HOME_FILES
            ):
                secrets.append(name)
                continue
            if path.is_symlink():
                if target in excluded:
                    continue
                refuse_link(path, target, parents)
            if path.is_dir():
                walk(path, rules, parents)
            elif path.is_file():
                files.append(path)

    walk(folder, inherited, ())
    return files, secrets


def _matches(path: Path, rules: Rules) -> bool:
    """Whether a rule leaves the path out."""
    slash = "/" if path.is_dir() else ""
    return any(spec.match_file(path.relative_to(base).as_posix() + slash) for base, spec in rules)


def _rules(folder: Path) -> Rules:
    """Return the rules of the folder's own ignore files."""
    files = [folder / name for name in IGNORE_FILES if (folder / name).is_file()]
    lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    return [(folder, GitIgnoreSpec.from_lines(lines))] if lines else []
