"""Installs what a model's own code needs on a node: the code package, its requirements, environment variables.

Each package has a folder in the node's home, named by a hash of its content. Folders appear atomically, and are
created once per node.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from llmrun.errors import EngineError
from llmrun.spec import Secret

INSTALL_TIMEOUT_S = 1800


class Environments:
    """The packages under `root`; `fetch` downloads a zip by its sha256."""

    def __init__(self, root: Path, fetch: Callable[[str], Awaitable[bytes]]) -> None:
        self._root = root
        self._fetch = fetch

    async def install_code(self, digest: str) -> Path:
        """Return the folder of the package with that sha256. Raises EngineError if the download does not match."""
        target = self._root / "packages" / digest
        if target.is_dir():
            return target
        data = await self._fetch(digest)
        if hashlib.sha256(data).hexdigest() != digest:
            raise EngineError(f"code package {digest[:12]} is damaged: deploy again")

        def unpack(folder: Path) -> None:
            with zipfile.ZipFile(io.BytesIO(data)) as package:
                package.extractall(folder)  # ZipFile drops '..' and drive letters from names

        await asyncio.to_thread(_create, target, unpack)
        return target

    async def install_requirements(self, requirements: Sequence[str]) -> Path:
        """Return a folder for PYTHONPATH with those `requirements` that the engine's environment lacks.

        Never replaces a package of the engine's environment. Raises EngineError if a requirement would.
        """
        installed = sorted(f"{d.name}=={d.version}" for d in metadata.distributions() if d.name)
        key = json.dumps([sorted(requirements), installed, sys.version])
        target = self._root / "environments" / hashlib.sha256(key.encode()).hexdigest()[:32]
        if target.is_dir():
            return target
        missing = await self._missing(requirements)
        folder = Path(await asyncio.to_thread(_temp_folder, target))
        try:
            if missing:
                await _uv("install", "--python", sys.executable, "--no-deps", "--target", str(folder), *missing)
            _publish(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return target

    async def _missing(self, requirements: Sequence[str]) -> list[str]:
        """`name==version` of each package to install in addition to the engine's environment."""
        out = await _uv("install", "--dry-run", "--python", sys.executable, *requirements)
        replaced = [line[3:] for line in out.splitlines() if line.startswith(" - ")]
        if replaced:
            raise EngineError(
                f"requirements={list(requirements)!r} would replace {', '.join(replaced)} of the engine's environment: "
                f"choose versions that are compatible with it"
            )
        return [_requirement(line[3:]) for line in out.splitlines() if line.startswith(" + ")]


def merged_env(spec_env: Mapping[str, Secret | str], where: str) -> dict[str, str]:
    """The node's own variables, updated with a spec's. Raises EngineError for a secret that the node does not have."""
    # Engines and hooks must not see Ray's and llmrun's variables (one may be the admin key). Ray sets OMP_NUM_THREADS
    # to the CPUs that an actor reserves; an engine counts its cores itself.
    private = ("RAY_", "LLMRUN_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(private) and k != "OMP_NUM_THREADS"}
    for key, value in spec_env.items():
        if isinstance(value, Secret):
            if value.secret not in os.environ:
                raise EngineError(
                    f"env={key!r}: the secret {value.secret} is not set on {where}: "
                    f"set it there in the environment of `llmrun up` or `ray start`"
                )
            env[key] = os.environ[value.secret]
        else:
            env[key] = value
    return env


def worker_env(spec_env: Mapping[str, Secret | str], where: str) -> dict[str, str]:
    """Return `merged_env` with llmrun's settings, for a process of llmrun. Raises EngineError."""
    return merged_env(spec_env, where) | {key: value for key, value in os.environ.items() if key.startswith("LLMRUN_")}


def _requirement(line: str) -> str:
    """Convert a line of uv's output to a requirement: uv prints `name==1.0 (from URL)` for a package from a URL."""
    match = re.fullmatch(r"([^= ]+)==\S+ \(from (.+)\)", line)
    return f"{match[1]} @ {match[2]}" if match else line


async def _uv(*args: str) -> str:
    from uv import find_uv_bin  # noqa: PLC0415 - only models with requirements need it

    process = await asyncio.create_subprocess_exec(
        find_uv_bin(), "pip", *args, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), INSTALL_TIMEOUT_S)
    except TimeoutError:
        raise EngineError(f"requirements: the installation timed out after {INSTALL_TIMEOUT_S} s") from None
    finally:
        if process.returncode is None:
            process.kill()
    text = out.decode(errors="replace")
    if process.returncode:
        reason = " ".join(line.strip() for line in text.splitlines() if line.strip())
        raise EngineError(f"requirements: the installation failed: {reason[:500]}")
    return text


def _create(target: Path, fill: Callable[[Path], None]) -> None:
    folder = Path(_temp_folder(target))
    try:
        fill(folder)
        _publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temp_folder(target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(dir=target.parent, prefix=".new-")


def _publish(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
    except OSError:
        if not target.is_dir():  # otherwise another process has created it with the same bytes
            raise
