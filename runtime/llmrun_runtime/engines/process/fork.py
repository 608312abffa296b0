"""Asks a node's fork server for an engine process."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llmrun_runtime.engines.process.child import Forked, ForkRefused
from llmrun_runtime.engines.process.unix_sockets import short_name

# The node agent's socket queues requests while a warm parent imports (13 s on 2 cores), which a plain start would too.
FORK_TIMEOUT_S = 60.0


def fork(warm: Path, argv: Sequence[str], env: Mapping[str, str], output: IO[bytes], title: str) -> Forked:
    """Have the warm parent behind the socket `warm` fork an engine, `title` in `ps`. Blocks. Raises NotForked."""
    request = json.dumps({"argv": list(argv), "env": dict(env), "title": title}).encode() + b"\n"
    caller = socket.socket(socket.AF_UNIX)
    pidfds: list[int] = []
    try:
        caller.settimeout(FORK_TIMEOUT_S)
        with short_name(warm) as name:
            caller.connect(name)
        sent = socket.send_fds(caller, [request], [output.fileno()])
        caller.sendall(request[sent:])
        data, pidfds, _, _ = socket.recv_fds(caller, 65536, 1)
        answer: dict[str, Any] = json.loads(data or b'{"refused": "it ended"}')
        if "pid" not in answer:
            raise ForkRefused(str(answer.get("refused")))
        return Forked(caller, int(answer["pid"]), pidfds[0])
    except (OSError, ValueError, LookupError, ForkRefused) as error:
        caller.close()
        for pidfd in pidfds:
            os.close(pidfd)
        if isinstance(error, ForkRefused):
            raise
        raise ForkRefused(f"{type(error).__name__}: {error}") from error
