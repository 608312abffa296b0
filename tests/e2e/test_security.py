"""A cluster as those who attack it see it: from a hostile folder, the network, another user's account."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import BIN, Home, free_port, leftovers, new_processes, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
# Modules that the processes of a cluster import sooner or later, from the standard library and from packages.
IMPORTED = (
    *("aiohttp", "cbor2", "certifi", "fsspec", "httptools", "jinja2", "psutil", "queue", "random", "ray", "secrets"),
    *("setproctitle", "sqlite3", "tomllib", "torch", "transformers", "uvicorn", "uvloop", "vllm", "zmq"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with modules that write a file when they are imported."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in IMPORTED:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'imported')!r}, 'a').write('{name} ')\n")
    return folder


@pytest.fixture(scope="module")
def attacked(folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[Home]:
    """A cluster that somebody started in that folder, with a model whose engine runs, and with a permissive umask."""
    processes, files = {process.pid for process in psutil.process_iter()}, leftovers()
    root = tmp_path_factory.mktemp("open")
    home = Home(root / "home", free_port())
    home.path.mkdir(mode=0o755)
    command = [str(BIN / "llmrun"), "up", "--port", str(home.port)]
    done = subprocess.run(
        command, cwd=folder, env=home.env, umask=0o022, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        text = f"@llm({str(tiny_weights)!r}, accelerator='cpu', cpus=0.5, idle_timeout=600)\nclass Target: ...\n"
        app = write_app(tmp_path_factory.mktemp("target") / "app.py", text)
        deploy = [str(BIN / "llmrun"), "deploy", str(app), "--yes"]
        done = subprocess.run(
            deploy, cwd=folder, env=home.env, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        yield home
    finally:
        home.ok("down")
    assert new_processes(processes) == [] and leftovers() - files == set()


def test_nothing_is_imported_from_the_folder_where_llmrun_is_typed(attacked: Home, folder: Path) -> None:
    assert attacked.ask("target").status_code == 200
    assert not (folder / "imported").exists(), (folder / "imported").read_text()


def test_other_users_can_read_no_file(attacked: Home) -> None:
    open_files = [
        path for path in (attacked.path, *attacked.path.rglob("*")) if stat.S_IMODE(path.lstat().st_mode) & 0o077
    ]
    assert [path for path in open_files if not path.is_symlink()] == []
    assert (attacked.path / "llmrun.db").is_file() and list((attacked.path / "logs").rglob("*.log"))
