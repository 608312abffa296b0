"""`unshare --map-root-user --mount python -m tests.support.host_faults [FAULT…]`: faults of a cluster's machine.

A full disk, a database that is locked or read-only, and a clock that jumps, each under traffic. It mounts file systems,
so it needs its own mount namespace. Prints each fault that the cluster survived; fails with an AssertionError.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.support.cluster import Home, free_port, titled, until, write_app
from tests.support.stub_engine import install

SMALL_DISK = "size=80m"
# Python's clock in all processes of the cluster; the file has the seconds by which it is wrong.
CLOCK = """
import os, time

if path := os.environ.get("CLOCK_OFFSET_FILE"):
    right = time.time

    def wrong():
        with open(path) as file:
            return right() + float(file.read() or 0)

    time.time = wrong
"""


def main(chosen: list[str]) -> None:
    """Run all faults, or those chosen, on one cluster of stub engines."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        disk, offset = folder / "disk", folder / "offset"
        stack.enter_context(mounted(disk, "-t", "tmpfs", "-o", SMALL_DISK, "tmpfs"))
        offset.write_text("0")
        packages = install(folder / "packages")
        (folder / "packages" / "sitecustomize.py").write_text(CLOCK)
        (folder / "weights").mkdir()
        (folder / "weights" / "config.json").write_text("{}")
        home = Home(disk / "home", free_port(), {**packages, "CLOCK_OFFSET_FILE": str(offset)})
        home.ok("up")
        try:
            home.ok("deploy", app(folder, "one", 300), "--yes")
            home.ok("deploy", app(folder, "two", 1), "--yes", "--lazy")
            for fault in (clock_jumps, database_is_locked, database_is_read_only, disk_is_full):
                if chosen and fault.__name__ not in chosen:
                    continue
                started = time.monotonic()
                fault(home, folder)
                print(f"{fault.__name__}: ok, {time.monotonic() - started:.0f} s", flush=True)
        finally:
            home.ok("down")
        assert processes_of(folder) == []


def clock_jumps(home: Home, folder: Path) -> None:
    """By an hour, forward and back: no request fails, no idle model ends early, none stays for longer."""
    for seconds in (3600, -3600, 0):
        (folder / "offset").write_text(str(seconds))
        end = time.monotonic() + 4
        assert home.ask("two").status_code == 200
        while time.monotonic() < end:
            assert home.ask("one").status_code == 200
        home.wait_for("two", "cold", 15)  # idle_timeout=1
        assert home.status("one")["state"] == "hot"


def database_is_locked(home: Home, folder: Path) -> None:
    """Requests are answered, models wake; a change fails with one line, and succeeds afterwards."""
    with contextlib.closing(sqlite3.connect(home.path / "llmrun.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert [home.ask(model).status_code for model in ("one", "two")] == [200, 200]
        message = fails_soon(home, "deploy", app(folder, "three", 1), "--yes", "--lazy")
        assert "locked" in message, message
        assert home.ask("one").status_code == 200
        other.execute("ROLLBACK")
    until(
        lambda: home.run("deploy", app(folder, "three", 1), "--yes", "--lazy").returncode == 0, 30, "it is free again"
    )


def database_is_read_only(home: Home, folder: Path) -> None:
    """Control cannot start; hot models answer, commands say why, and control comes back when it can."""
    file = home.path / "llmrun.db"
    with mounted(file, "--bind", file):
        subprocess.run(["mount", "-o", "remount,bind,ro", file], check=True)
        for control in titled(home, "ray::Control"):
            control.kill()
        change = ("deploy", app(folder, "four", 1), "--yes", "--lazy")
        until(lambda: re.search("read-?only", fails_soon(home, *change)), 40, "control says what is wrong")
        assert home.ask("one").status_code == 200
    until(lambda: home.run("deploy", app(folder, "four", 1), "--yes", "--lazy").returncode == 0, 60, "control is back")
    assert home.ask("four").status_code == 200


def disk_is_full(home: Home, folder: Path) -> None:
    """Hot models answer; starts and deploys fail at once with the cause; all is well once there is space again."""
    home.make_hot("one")
    home.wait_for("two", "cold", 30)
    filler = folder / "disk" / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    assert shutil.disk_usage(folder / "disk").free < 2**16
    assert home.ask("one").status_code == 200
    until(lambda: "0.0 GiB free (" in home.ok("status"), 40, "the status has a warning")
    answer = home.ask("two", timeout=60)
    assert answer.status_code == 503 and "MiB free" in answer.text, answer.text
    assert "MiB free" in home.status("two")["cause"]
    fails_soon(home, "deploy", app(folder, "five", 300), "--yes")
    assert home.ask("one").status_code == 200 and home.status("one")["state"] == "hot"
    filler.unlink()
    until(lambda: home.ask("two", timeout=60).status_code == 200, 60, "the model wakes again")
    home.ok("deploy", app(folder, "five", 300), "--yes")
    until(lambda: "0.0 GiB free (" not in home.ok("status"), 60, "the status shows the space")


def processes_of(folder: Path) -> list[str]:
    """Return the processes of clusters whose home is below a folder. Other tests' clusters may run meanwhile."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LLMRUN_HOME", "").startswith(str(folder)):
                found.append(f"{process.pid} {process.cmdline()}")
    return found


def fails_soon(home: Home, *command: str | Path) -> str:
    """Run a command that must fail with one line within a minute; return the line."""
    started = time.monotonic()
    message = home.fails(*command)
    assert time.monotonic() - started < 60, message
    return message


def app(folder: Path, name: str, idle_timeout: float) -> Path:
    """Write an app with one model."""
    options = f"{str(folder / 'weights')!r}, engine='stub', cpus=0.2, idle_timeout={idle_timeout:g}, min_uptime=0"
    return write_app(folder / name / "app.py", f"@llm({options}, name={name!r})\nclass Model: ...\n")


@contextlib.contextmanager
def mounted(where: Path, *options: str | Path) -> Iterator[None]:
    """Mount a file system during the block."""
    if not where.exists():
        where.mkdir()
    subprocess.run(["mount", *options, where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
