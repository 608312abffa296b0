"""llmrun tells nobody anything: in its whole life no packet leaves the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import REPO
from tests.support.network_watch import OUTSIDE

# Ray 2.60 asks the cloud's own metadata service which cloud it runs on, whatever it is told of usage statistics; the
# address is the machine's own link's, and the question says nothing.
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
    found = json.loads(done.stdout.splitlines()[-1])
    assert [packet for packet in found["seen"] if not any(asked in packet for asked in ASKED)] == []
    assert [packet.split()[1] for packet in found["own"]] == [f"{OUTSIDE[0]}:{OUTSIDE[1]}"], "it would have been seen"
