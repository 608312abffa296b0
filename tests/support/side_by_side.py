"""Run the end-to-end tests in two groups at once: alone, they leave almost half of two cores idle.

`python -m tests.support.side_by_side [ARGS]` runs pytest for each group in a PID and mount namespace, with its own
temporary folder and /dev/shm. Neither group sees the other's processes or files, so the tests can check that they leave
nothing behind. Node addresses and ports differ. With ARGS, or without permission for namespaces, pytest runs once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.cluster import REPO

TESTS = REPO / "tests/e2e"
# About half of the time, and all tests that start clusters. Files that are not named here are in the first group.
SECOND = ("builders", "lora", "metrics", "no_telemetry", "placement", "tutorial", "weights", "yaml")
NAMESPACE = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
# As the namespace's first process, bash reaps the daemons that tests leave behind.
INIT = 'mount -t tmpfs tmpfs /dev/shm && "$@"; exit $?'


def pytest_command(*args: str | Path) -> list[str]:
    """Return the command line of one run."""
    return [sys.executable, "-m", "pytest", *map(str, args)]


def is_permitted(namespace: list[str]) -> bool:
    """Whether this user may create such a namespace."""
    try:
        return subprocess.run([*namespace, "bash", "-c", INIT, "init", "true"], check=False).returncode == 0
    except FileNotFoundError:
        return False


def main() -> int:
    """Run the tests; return the first exit code other than 0."""
    args = sys.argv[1:]
    namespace = NAMESPACE if os.geteuid() == 0 else [*NAMESPACE, "--user", "--map-root-user"]
    if args or not is_permitted(namespace):
        return subprocess.run(pytest_command(TESTS, *args), check=False).returncode
    files = sorted(TESTS.glob("test_*.py"))
    second = [file for file in files if file.stem.removeprefix("test_") in SECOND]
    groups = {"first": [file for file in files if file not in second], "second": second}
    with tempfile.TemporaryDirectory(prefix="e2e-") as folder:
        runs = {}
        for name, group in groups.items():
            (temp := Path(folder) / name).mkdir()
            log = (Path(folder) / f"{name}.log").open("w+")
            command = [*namespace, "bash", "-c", INIT, "init", *pytest_command("--durations=15", *group)]
            run = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(temp)}, cwd=REPO)
            runs[name] = run, log
        for name, (run, log) in runs.items():
            run.wait()
            log.seek(0)
            print(f"== {name} group of end-to-end tests\n{log.read()}", flush=True)
            log.close()
    return next((run.returncode for run, _ in runs.values() if run.returncode), 0)


if __name__ == "__main__":
    sys.exit(main())
