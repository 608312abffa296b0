"""A real PostgreSQL server in a folder of its own, which tests may kill and freeze."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.cluster import free_port, until

INIT_TIMEOUT_S, START_TIMEOUT_S, STOP_TIMEOUT_S = 60, 30, 10
NOBODY = pwd.getpwnam("nobody")
INSTALL = "PostgreSQL's `postgres` and `initdb` must be in PATH (`just unit` puts them there where it may)"


class Postgres:
    """The server. It stores its data in `folder`, and accepts every connection from this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        options = ("-U", "llmrun", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        code = self._run("initdb", "-D", str(folder / "data"), *options).wait(INIT_TIMEOUT_S)
        assert code == 0, (folder / "log").read_text()

    @property
    def url(self) -> str:
        """The URL of its database, as a person writes it."""
        return f"postgresql://llmrun@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start the server, also after it was killed; wait until it accepts connections."""
        options = ("-D", str(self._folder / "data"), "-h", "127.0.0.1", "-p", str(self._port), "-k", str(self._folder))
        process = self._process = self._run("postgres", *options)
        ready = self._folder / "data" / "postmaster.pid"

        def is_ready() -> bool:
            assert process.poll() is None, (self._folder / "log").read_text()
            lines = ready.read_text().splitlines() if ready.exists() else []
            return lines[:1] == [str(process.pid)] and lines[-1].strip() == "ready"

        until(is_ready, START_TIMEOUT_S, "PostgreSQL accepts connections")

    def kill(self) -> None:
        """Kill all of its processes at once, as a power failure does."""
        assert self._process
        family = self._family()
        for process in family:
            process.kill()
        self._process.wait(STOP_TIMEOUT_S)
        psutil.wait_procs(family, STOP_TIMEOUT_S)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all of its processes during the block: its connections stay open, and nothing answers."""
        family = self._family()
        for process in family:
            process.suspend()
        try:
            yield
        finally:
            for process in family:
                process.resume()

    def stop(self) -> None:
        """End the server."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # a fast shutdown
            self._process.wait(STOP_TIMEOUT_S)

    def _family(self) -> list[psutil.Process]:
        assert self._process
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def _run(self, command: str, *args: str) -> subprocess.Popen[bytes]:
        path = shutil.which(command)
        assert path, INSTALL
        root = os.geteuid() == 0  # as whom it refuses to run
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [path, *args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                user=NOBODY.pw_uid if root else None,
                group=NOBODY.pw_gid if root else None,
                extra_groups=[] if root else None,
                start_new_session=True,
            )


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Run a server during the block."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, NOBODY.pw_uid, NOBODY.pw_gid)
        server = Postgres(folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
