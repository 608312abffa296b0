"""Three minutes of `just soak`, with a fixed seed: kills of every kind of process under mixed traffic."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import REPO

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_kills_of_every_kind_lose_no_request(tiny_weights: Path) -> None:
    command = [sys.executable, "-m", "tests.soak", "3", "--every", "15", "--seed", "1", "--weights", str(tiny_weights)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "soak: ok, answered" in done.stdout
    assert "kills of 10 of 10 kinds" in done.stdout
