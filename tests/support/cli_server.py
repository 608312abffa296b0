"""Runs the command line in forked processes: Python's start and the imports take 0.4 s of a core, hundreds of times.

`python -m tests.support.cli_server SOCKET` imports the command line once. Each connection sends one request: arguments,
environment, and open files for standard output and error. The server forks a process that runs the same `main` as the
console script, and answers with its exit code. It stops when its standard input closes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

START_TIMEOUT_S = 60
REPO = Path(__file__).parent.parent.parent


def run(args: Sequence[str], env: Mapping[str, str], timeout: float, out: IO[str], err: IO[str]) -> int:
    """Run `llmrun ARGS`; return its exit code. Raises subprocess.TimeoutExpired; the process is then killed."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout)
        client.connect(server())
        request = json.dumps({"args": list(args), "env": dict(env)}).encode() + b"\n"
        sent = socket.send_fds(client, [request], [out.fileno(), err.fileno()])
        client.sendall(request[sent:])
        try:
            return int(client.makefile().readline())
        except TimeoutError:
            raise subprocess.TimeoutExpired(list(args), timeout) from None


@functools.cache
def server() -> str:
    """Start the server of this test session; return its address."""
    folder = tempfile.TemporaryDirectory(prefix="cli-")
    address = f"{folder.name}/socket"
    command = [sys.executable, "-m", "tests.support.cli_server", address]
    quiet = subprocess.DEVNULL  # rich looks at these on import: no terminal, no colors
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, cwd=REPO)

    def stop() -> None:
        assert process.stdin
        process.stdin.close()
        process.wait(10)
        folder.cleanup()

    atexit.register(stop)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not Path(address).exists():
        assert process.poll() is None and time.monotonic() < deadline, "the command line's server did not start"
        time.sleep(0.02)
    return address


def handle(client: socket.socket) -> None:
    """Run one request in a child, and answer with its exit code; kill the child if the client disconnects first."""
    data, files, _, _ = socket.recv_fds(client, 65536, 2)
    while not data.endswith(b"\n"):
        data += client.recv(65536)
    request = json.loads(data)
    child = os.fork()
    if not child:
        client.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        os.closerange(3, 1024)
        run_main(request["args"], request["env"])
    pidfd = os.pidfd_open(child)
    ready, _, _ = select.select([pidfd, client.fileno()], [], [])
    if pidfd not in ready:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def run_main(args: list[str], env: dict[str, str]) -> None:
    """Run the console script's function in this process, and exit."""
    from llmrun_cli.main import main

    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["llmrun", *args]
    code: object = 1
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - as Python does at the end of a script
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    """Serve until standard input closes."""
    import llmrun_cli.main  # noqa: F401 - for all children

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1] + ".new")
        listener.listen(64)
        os.rename(sys.argv[1] + ".new", sys.argv[1])
        while True:
            ready, _, _ = select.select([0, listener.fileno()], [], [], 1)
            if 0 in ready:
                return
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if listener.fileno() in ready:
                client, _ = listener.accept()
                if not os.fork():
                    listener.close()
                    handle(client)
                    os._exit(0)
                client.close()


if __name__ == "__main__":
    main()
