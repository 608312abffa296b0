"""Installs what a model's own code needs on a node: the code package, its requirements.

Each package has a folder in the node's home, named by a hash of its content. Folders appear atomically, are created
once per node, and are removed some time after their last use.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Awaitable, Callable, Collection, Sequence
from importlib import metadata
from pathlib import Path

from llmrun.errors import EngineError
from llmrun.wire import MAX_PACKAGE_BYTES
from llmrun_runtime.node.variables import installer_env

INSTALL_TIMEOUT_S = 1800
# Ten times what a package may have compressed.
MAX_UNPACKED_BYTES = 10 * MAX_PACKAGE_BYTES
KEEP_UNUSED_S = 86400.0  # longer than an installation, and than a replica drains


class Environments:
    """The packages under `root`; `fetch` downloads a zip by its sha256.

    With `hold`, the folders that it returns are not removed until this process exits.
    """

    def __init__(self, root: Path, fetch: Callable[[str], Awaitable[bytes]], *, hold: bool = True) -> None:
        self._root = root
        self._fetch = fetch
        self._hold = hold

    async def install_code(self, digest: str) -> Path:
        """Return the folder of the package with that sha256. Raises EngineError if the download does not match."""
        target = self._root / "packages" / digest
        if await asyncio.to_thread(_use, target, self._hold):
            return target
        data = await self._fetch(digest)

        def unpack(folder: Path) -> None:
            if hashlib.sha256(data).hexdigest() != digest:
                raise EngineError(f"code package {digest[:12]} is damaged: deploy again")
            with zipfile.ZipFile(io.BytesIO(data)) as package:
                if (size := sum(info.file_size for info in package.infolist())) > MAX_UNPACKED_BYTES:
                    raise EngineError(
                        f"code package {digest[:12]} has {size / 2**30:.1f} GiB, more than "
                        f"{MAX_UNPACKED_BYTES / 2**30:g} GiB: leave files out with .llmrunignore"
                    )
                package.extractall(folder)  # ZipFile drops '..' and drive letters from names

        await asyncio.to_thread(_create, target, unpack)
        await asyncio.to_thread(_use, target, self._hold)
        return target

    async def install_requirements(self, requirements: Sequence[str]) -> Path:
        """Return a folder for PYTHONPATH with those `requirements` that the engine's environment lacks.

        Never replaces a package of the engine's environment. Raises EngineError if a requirement would.
        """
        installed = await asyncio.to_thread(_installed)
        target = self._environment(requirements, installed)
        if await asyncio.to_thread(_use, target, self._hold):
            return target
        missing = await self._missing(requirements)
        folder = Path(await asyncio.to_thread(_temp_folder, target))
        try:
            if missing:
                target_options = ("--no-deps", "--target", str(folder))
                await _uv("install", "--python", sys.executable, *target_options, "--", *missing)
            _publish(folder, target)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        await asyncio.to_thread(_use, target, self._hold)
        return target

    async def remove_unused(
        self, packages: Collection[str], requirements: Collection[Sequence[str]], now: float
    ) -> list[Path]:
        """Remove the folders that nothing has used for KEEP_UNUSED_S, and remains of installations; return them.

        In use are those for `packages` and `requirements`, and those that a running process holds. `now` is Unix time.
        """
        installed = await asyncio.to_thread(_installed)
        used = {self._root / "packages" / digest for digest in packages}
        used |= {self._environment(required, installed) for required in requirements}
        return await asyncio.to_thread(_remove_unused, self._root, used, now)

    def _environment(self, requirements: Sequence[str], installed: Sequence[str]) -> Path:
        key = json.dumps([sorted(requirements), installed, sys.version])
        return self._root / "environments" / hashlib.sha256(key.encode()).hexdigest()[:32]

    async def _missing(self, requirements: Sequence[str]) -> list[str]:
        """`name==version` of each package to install in addition to the engine's environment."""
        out = await _uv("install", "--dry-run", "--python", sys.executable, "--", *requirements)
        replaced = [line[3:] for line in out.splitlines() if line.startswith(" - ")]
        if replaced:
            raise EngineError(
                f"requirements={list(requirements)!r} would replace {', '.join(replaced)} of the engine's environment: "
                f"choose versions that are compatible with it"
            )
        return [_requirement(line[3:]) for line in out.splitlines() if line.startswith(" + ")]


def _requirement(line: str) -> str:
    """Convert a line of uv's output to a requirement: uv prints `name==1.0 (from URL)` for a package from a URL."""
    match = re.fullmatch(r"([^= ]+)==\S+ \(from (.+)\)", line)
    return f"{match[1]} @ {match[2]}" if match else line


async def _uv(*args: str) -> str:
    from uv import find_uv_bin  # noqa: PLC0415 - only models with requirements need it

    process = await asyncio.create_subprocess_exec(
        find_uv_bin(),
        "pip",
        *args,
        env=installer_env(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
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


def _installed() -> list[str]:
    """Return the packages of the engine's environment."""
    return sorted(f"{d.name}=={d.version}" for d in metadata.distributions() if d.name)


def _use(target: Path, hold: bool) -> bool:
    """Mark a folder as used now; with `hold`, also until this process exits. Return whether it exists."""
    try:
        folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    with contextlib.suppress(OSError):  # not every network filesystem has locks
        fcntl.flock(folder, fcntl.LOCK_SH)  # `_remove` has the lock only while it renames the folder
    with contextlib.suppress(OSError):  # another user's
        os.utime(folder)
    exists = target.is_dir() and os.path.samestat(os.fstat(folder), target.stat())
    if not (hold and exists):
        os.close(folder)
    return exists


def _remove_unused(root: Path, used: Collection[Path], now: float) -> list[Path]:
    removed = []
    for folder in [*(root / "packages").glob("*"), *(root / "environments").glob("*")]:
        with contextlib.suppress(FileNotFoundError):  # another agent of this home has removed it
            if folder in used:
                os.utime(folder)
            elif now - folder.stat().st_mtime > KEEP_UNUSED_S and _remove(folder):
                removed.append(folder)
    return removed


def _remove(folder: Path) -> bool:
    """Remove a folder. Return False if a process holds it, or the filesystem has no locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doomed = folder.with_name(f".old-{secrets.token_hex(8)}")
        os.rename(folder, doomed)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    finally:
        os.close(handle)
    shutil.rmtree(doomed, ignore_errors=True)  # what is left is removed next time
    return True


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
