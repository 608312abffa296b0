"""The engine's side of the lease: a process that holds it exits when its replica does.

vLLM calls `hold` as a plugin in each of its processes (entry point `vllm.general_plugins`), so `kill -9` of the
replica or of any process leaves none behind. Standard library only. Outside of engines that llmrun started it has no
effect.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future
from typing import Any, NoReturn

from llmrun_runtime.engines.base import LEASE_ENV, TOKEN_ENV, prove_token
from llmrun_runtime.engines.shim.output import ignore_write_errors

CONNECT_TIMEOUT_S = 10
# The replica reads lines up to MESSAGE_BYTES. JSON has at most 12 bytes per character.
MAX_TEXT = 8000
_connection: socket.socket | None = None
_owner_pid = 0
_whole_group = False
_pending_lock = threading.Lock()
_pending: dict[int, Future[dict[str, Any]]] = {}
"""Requests to the replica without a reply yet, by number."""
_numbers = itertools.count()


def hold(*, whole_group: bool = False) -> None:
    """Connect to the replica, and kill this process as soon as that connection closes; or its whole process group.

    Can be called repeatedly. A forked child takes its own lease.
    """
    global _connection, _owner_pid, _whole_group  # noqa: PLW0603 - one lease per process, whoever calls
    _whole_group = _whole_group or whole_group
    address = os.environ.get(LEASE_ENV)
    if not address or _owner_pid == os.getpid():
        return
    ignore_write_errors()
    if not _owner_pid:
        os.register_at_fork(after_in_child=hold)
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S)
    except OSError as error:
        _exit(f"the replica at {address} is not reachable ({error})")
    connection.settimeout(None)
    _connection = connection
    _owner_pid = os.getpid()
    # Not the token itself: if the replica is gone, another process may have taken its port.
    notify(pid=_owner_pid, proof=prove_token(os.environ.get(TOKEN_ENV, ""), _owner_pid))
    threading.Thread(target=_watch, args=(connection,), name="llmrun-lease", daemon=True).start()


def notify(**message: Any) -> None:
    """Send the replica a message: `port=` (HTTP), `ready=True` or `failed="reason"`. No effect without a lease."""
    if "failed" in message:
        message["failed"] = message["failed"][:MAX_TEXT]
    if _connection is not None:
        _connection.sendall(json.dumps(message).encode() + b"\n")


def request(**message: Any) -> Future[dict[str, Any]]:
    """Send the replica a request; return the future of its reply."""
    reply: Future[dict[str, Any]] = Future()
    with _pending_lock:
        number = next(_numbers)
        _pending[number] = reply
    notify(ask=number, **message)
    return reply


def _watch(connection: socket.socket) -> None:
    try:
        for line in connection.makefile("rb"):
            message = json.loads(line)
            with _pending_lock:
                reply = _pending.pop(message["answer"])
            if reply.set_running_or_notify_cancel():
                reply.set_result(message)
    except (OSError, ValueError, LookupError):
        pass
    _exit("its lease was closed by the replica")


def _exit(reason: str) -> NoReturn:
    # Without clean-up handlers: they may wait for a peer that exits at the same moment.
    with contextlib.suppress(OSError):  # a full disk
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            f"[llmrun] engine process {os.getpid()} exits: {reason}\n".encode(),
        )
    if _whole_group and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
