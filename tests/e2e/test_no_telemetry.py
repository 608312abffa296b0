"""llmrun sends no telemetry: no packet leaves the machine from `up` to `down`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import REPO
from tests.support.network_watch import OUTSIDE

# Ray 2.60 queries the cloud's metadata service to detect the cloud, even with usage statistics off. The address is
# link-local, and the query contains no data.
ASKED = ("tcp 169.254.169.254:80 ", "metadata\\x06google\\x08internal")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_no_packet_leaves_the_machine(tmp_path: Path, tiny_weights: Path) -> None:
    command = [
        "unshare",
        "-rn",
        sys.executable,
        "-m",
        "tests.support.network_watch",
        str(tmp_path / "home"),
        str(tiny_weights),
    ]
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    packets = json.loads(done.stdout.splitlines()[-1])
    assert [packet for packet in packets["seen"] if not any(allowed in packet for allowed in ASKED)] == []
    assert [packet.split()[1] for packet in packets["own"]] == [f"{OUTSIDE[0]}:{OUTSIDE[1]}"], "it would have been seen"
