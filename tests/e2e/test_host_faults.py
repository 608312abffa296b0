"""A full disk, a database that is locked or read-only, and a clock that jumps. See `tests.support.host_faults`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.cluster import REPO

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_a_cluster_survives_faults_of_its_host() -> None:
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", "tests.support.host_faults"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok, ") == 4
