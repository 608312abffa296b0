"""Requests an engine process from the node's fork server."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llmrun_runtime.engines.process.child import Forked, ForkRefused
from llmrun_runtime.engines.process.unix_sockets import short_path

# The node agent's socket queues requests while a fork server imports (13 s on 2 cores); a plain start imports as long.
FORK_TIMEOUT_S = 60.0


def fork(forkserver: Path, argv: Sequence[str], env: Mapping[str, str], output: IO[bytes], title: str) -> Forked:
    """Fork an engine from the fork server behind this socket; `ps` shows `title`. Blocks. Raises ForkRefused."""
    request = json.dumps({"argv": list(argv), "env": dict(env), "title": title}).encode() + b"\n"
    connection = socket.socket(socket.AF_UNIX)
    pidfds: list[int] = []
    try:
        connection.settimeout(FORK_TIMEOUT_S)
        with short_path(forkserver) as name:
            connection.connect(name)
        sent = socket.send_fds(connection, [request], [output.fileno()])
        if sent < len(request):  # even an empty write fails if the fork server has already refused and closed
            connection.sendall(request[sent:])
        data, pidfds, _, _ = socket.recv_fds(connection, 65536, 1)
        reply: dict[str, Any] = json.loads(data or b'{"refused": "the fork server exited"}')
        if "pid" not in reply:
            raise ForkRefused(str(reply.get("refused")))
        return Forked(connection, int(reply["pid"]), pidfds[0])
    except (OSError, ValueError, LookupError, ForkRefused) as error:
        connection.close()
        for pidfd in pidfds:
            os.close(pidfd)
        if isinstance(error, ForkRefused):
            raise
        hint = ", it has failed: see warm-*.log in the node's logs/" if isinstance(error, ConnectionResetError) else ""
        raise ForkRefused(f"the fork server did not answer ({type(error).__name__}: {error}){hint}") from error
