"""The engine's end of the lease: a process that holds it ends when its replica does.

vLLM loads `hold` as a plugin in each of its processes (entry point `vllm.general_plugins`), so that a
`kill -9` of the replica or of any of them leaves none behind. Standard library only; outside of an engine
that llmrun started it does nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future
from typing import Any, NoReturn

from llmrun_runtime.engines.base import LEASE_ENV, TOKEN_ENV

CONNECT_TIMEOUT_S = 10
_connection: socket.socket | None = None
_owner = 0
_whole_group = False
_asking = threading.Lock()
_asked: dict[int, Future[dict[str, Any]]] = {}
_numbers = itertools.count()


def hold(*, whole_group: bool = False) -> None:
    """Connect to the replica and end this process at once when that connection closes; or all of its group.

    Safe to call often; a forked child takes a lease of its own.
    """
    global _connection, _owner, _whole_group  # noqa: PLW0603 - one lease per process, whoever asks for it
    _whole_group = _whole_group or whole_group
    address = os.environ.get(LEASE_ENV)
    if not address or _owner == os.getpid():
        return
    if not _owner:
        os.register_at_fork(after_in_child=hold)
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S)
    except OSError as error:
        _end(f"the replica at {address} is gone ({error})")
    connection.settimeout(None)
    _connection = connection
    _owner = os.getpid()
    tell(token=os.environ.get(TOKEN_ENV, ""), pid=_owner)
    threading.Thread(target=_watch, args=(connection,), name="llmrun-lease", daemon=True).start()


def tell(**message: Any) -> None:
    """Send the replica a message; nothing without a lease."""
    if _connection is not None:
        _connection.sendall(json.dumps(message).encode() + b"\n")


def ask(**message: Any) -> Future[dict[str, Any]]:
    """Send the replica a question; its answer, whenever that comes."""
    answer: Future[dict[str, Any]] = Future()
    with _asking:
        number = next(_numbers)
        _asked[number] = answer
    tell(ask=number, **message)
    return answer


def _watch(connection: socket.socket) -> None:
    try:
        for line in connection.makefile("rb"):
            message = json.loads(line)
            with _asking:
                answer = _asked.pop(message["answer"])
            if answer.set_running_or_notify_cancel():
                answer.set_result(message)
    except (OSError, ValueError, LookupError):
        pass
    _end("the replica let go of its lease")


def _end(why: str) -> NoReturn:
    # No clean-up handlers: they may wait for a peer that ends in this same moment.
    os.write(
        sys.__stderr__.fileno() if sys.__stderr__ else 2,
        f"[llmrun] engine process {os.getpid()} ends: {why}\n".encode(),
    )
    if _whole_group and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
