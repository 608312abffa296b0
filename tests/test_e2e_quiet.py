"""llmrun tells nobody anything: in its whole life no packet leaves the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.quiet import OUTSIDE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_no_packet_leaves_the_machine(tmp_path: Path, tiny_weights: Path) -> None:
    command = ["unshare", "-rn", sys.executable, "-m", "tests.quiet", str(tmp_path / "home"), str(tiny_weights)]
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
    assert found["seen"] == []
    assert [packet.split()[1] for packet in found["own"]] == [f"{OUTSIDE[0]}:{OUTSIDE[1]}"], "it would have been seen"
