"""The tutorial's commands, run in order, print the output that the page shows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.cluster import REPO, Home

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
PAGE = REPO / "docs" / "tutorial.md"
# A block of commands, and the block of expected output that follows it, if any.
BLOCK = re.compile(r"^```bash\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)
MARKER = "### block "


def missing_fragments(expected: str, output: str) -> list[str]:
    """Return the fragments of the expected lines that are not in the output; `…` stands for any text in a line."""
    lines = output.splitlines()
    patterns = [".*".join(map(re.escape, line.split("…"))) for line in expected.splitlines()]
    return [pattern for pattern in patterns if not any(re.search(pattern, line) for line in lines)]


def test_the_tutorials_commands_print_the_expected_output(home: Home, tmp_path: Path) -> None:
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) > 10
    # The page's commands run in a clone of the repository and create a folder in it.
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "examples").symlink_to(REPO / "examples")
    script = "".join(f"echo '{MARKER}'\n{commands}" for commands, _ in blocks)
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path / "clone",
            env=home.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=540,
            check=False,
        )
    finally:
        home.run("down")
    assert done.returncode == 0, f"{done.stdout}\n{home.recent_logs()}"
    outputs = done.stdout.split(f"{MARKER}\n")[1:]
    assert len(outputs) == len(blocks)
    for (commands, expected), output in zip(blocks, outputs, strict=True):
        missing = missing_fragments(expected, output)
        assert not missing, f"{commands}\nprinted\n{output}\nwithout {missing}"
