"""The warm parent: `python -m llmrun_runtime.engines.forkserver.server MODULE FD` imports an engine's server, and forks it.

MODULE is the one that the engine's command runs: `preload()` imports, `main()` serves `sys.argv`; `learn(argv)`, some
time after a fork, keeps what that child needed beside, and `recall(argv)`, before one, drops what is out of date;
`spoilt()` says why its children could not serve. FD is a listening Unix socket that the node agent holds, so that
requests queue while a parent imports or is replaced. A request is one JSON line with a file descriptor for the child's
output; the answer is `{"pid": …}` with a pidfd, and later `{"exit": …}`, or `{"refused": why}`: the caller then starts
the engine as a plain process.

The parent has one thread, so nothing is locked at a fork, and no device state. It ends when its standard input hangs
up (the agent is gone), when what it imported has been reinstalled, and when it has grown: the agent starts another.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# C code reads these while it is loaded, unseen by `noted_reads`.
READ_UNSEEN = (
    *("CUDA_", "GOMP_", "KMP_", "LD_", "MALLOC_", "MKL_", "NCCL_", "OMP_", "OPENBLAS_"),
    *("PYTHON", "PYTORCH_", "TORCH_", "TZ"),
)
# These differ from engine to engine, and a child heeds them: `become`.
PER_CHILD = frozenset({"TMPDIR", "CUDA_VISIBLE_DEVICES", "PYTHONUNBUFFERED"})
LD_PRELOAD_BEFORE = "LLMRUN_LD_PRELOAD"
# numpy's OpenBLAS starts its threads when it is loaded; OpenMP's start with the first parallel loop, in a child.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
POLL_S = 5.0
REQUEST_TIMEOUT_S = 2.0
# By then a child has started, and wants its cores for itself no more.
LEARN_AFTER_S = 10.0
MAX_REQUEST_BYTES = 2**20
# Imports that some model needed once, and the allocator's slack; beyond it something leaks.
GROWTH = 1.25


@dataclass(frozen=True)
class ForkRequest:
    """What a child is to be: its arguments, its whole environment, where its output goes."""

    argv: list[str]
    env: dict[str, str]
    output: int
    title: str = ""

    def become(self, module: str) -> None:
        """Turn this process, just forked, into one that was started with these."""
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (self.output, 1), (self.output, 2)):
            os.dup2(source, target)
        os.close(null)
        os.close(self.output)
        os.environ.clear()
        os.environ.update(self.env)
        sys.argv = [module, *self.argv]
        set_title(self.title)
        tempfile.tempdir = None  # as TMPDIR says, not as the parent's did
        time.tzset()
        for name, reseed in (("numpy.random", "seed"), ("torch", "seed")):  # Python reseeds its own
            if name in sys.modules:
                getattr(sys.modules[name], reseed)()


class ForkServer:
    """Forks a child per request. `read`: the variables that imports looked at, which a child cannot have otherwise."""

    def __init__(self, module: Any, listener: socket.socket, read: frozenset[str], env: Mapping[str, str]) -> None:
        self._module = module
        self._listener = listener
        self._read = read
        self._env = dict(env)
        changed = {key: value for key, value in os.environ.items() if env.get(key) != value}
        self._written = {key: value for key, value in changed.items() if key not in ONE_THREAD}
        """What imports have set: a plain start's imports would."""
        self._installed = installed(module.PACKAGE)
        self._size = private_bytes()
        self._callers: dict[int, socket.socket] = {}
        self._last: list[str] = []
        self._learn_at = 0.0
        self._wakeup, self._woken = socket.socketpair()

    def serve(self) -> ForkRequest | None:
        """Serve until the end: None. In a child: what it is to be."""
        for sock in (self._wakeup, self._woken, self._listener):
            sock.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            sources = [0, self._listener.fileno(), self._wakeup.fileno()]
            ready, _, _ = select.select(sources, [], [], POLL_S)
            if self._wakeup.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wakeup.recv(4096)
                self._reap()
            if 0 in ready and not os.read(0, 1):
                return None
            if why := self._worn():
                print(f"warm parent {os.getpid()} ends: {why}", flush=True)
                return None
            if self._listener.fileno() in ready and (request := self._answer()):
                return request
            if self._last and time.monotonic() > self._learn_at:
                self._learn()

    def _learn(self) -> None:
        """Import and keep what the last child needed beside; the next one like it has it already."""
        self._module.learn(self._last)
        self._last = []
        gc.collect()
        gc.freeze()
        self._size = max(self._size, private_bytes())

    def _worn(self) -> str:
        """Why this parent should be replaced; "" if it need not."""
        if installed(self._module.PACKAGE) != self._installed:
            return f"{self._module.PACKAGE} has been installed anew, or something beside it"
        if threads() > 1:
            return f"it has {threads()} threads and cannot fork safely"
        if why := self._module.spoilt():
            return str(why)
        if private_bytes() > GROWTH * self._size:
            return "it has grown"
        return ""

    def _answer(self) -> ForkRequest | None:
        """Answer one caller; in the child that is forked for it, the request."""
        try:
            caller, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return None
        caller.settimeout(REQUEST_TIMEOUT_S)
        output = pid = -1
        try:
            data, output = _receive(caller)
            if not data:
                raise ConnectionAbortedError("the caller only looked whether anybody listens")
            said = json.loads(data)
            env = {str(key): str(value) for key, value in said["env"].items()}
            request = ForkRequest(list(said["argv"]), {**self._written, **env}, output, str(said["title"]))
            if _hung_up(caller):
                raise ConnectionAbortedError("the caller did not wait")
            if why := self._unfit(env):
                caller.sendall(json.dumps({"refused": why}).encode() + b"\n")
                caller.close()
                return None
            self._module.recall(request.argv)
            self._last, self._learn_at = request.argv, time.monotonic() + LEARN_AFTER_S
            pid = os.fork()
            if not pid:
                self._leave(caller)
                return request
            self._callers[pid] = caller
            pidfd = os.pidfd_open(pid)
            try:
                socket.send_fds(caller, [json.dumps({"pid": pid}).encode() + b"\n"], [pidfd])
            finally:
                os.close(pidfd)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # a caller that went, a stranger
            if not isinstance(error, ConnectionAbortedError):
                print(f"a request failed: {error!r}", flush=True)
            if caller not in self._callers.values():
                caller.close()
        finally:
            if output >= 0 and pid:
                os.close(output)
        return None

    def _unfit(self, env: Mapping[str, str]) -> str:
        """Why a child cannot have this environment; "" if it can."""
        names = {name for name in {*env, *self._env} if name in self._read or name.startswith(READ_UNSEEN)}
        own = {name for name in names if name in PER_CHILD or name.startswith("LLMRUN_")}
        other = sorted(name for name in names - own if env.get(name) != self._env.get(name))
        return f"its environment differs in {', '.join(other)}, which imports have read" if other else ""

    def _leave(self, caller: socket.socket) -> None:
        """In the child: close what is the parent's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for sock in (caller, self._listener, self._wakeup, self._woken, *self._callers.values()):
            sock.close()
        self._callers.clear()

    def _reap(self) -> None:
        """Tell callers of children that have ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            caller = self._callers.pop(pid, None)
            if caller:
                with contextlib.suppress(OSError):
                    caller.sendall(json.dumps({"exit": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                caller.close()


def _receive(caller: socket.socket) -> tuple[bytes, int]:
    """One line, and the descriptor that came with it; b"" of a caller that said nothing. Raises OSError, ValueError."""
    data, descriptors, _, _ = socket.recv_fds(caller, MAX_REQUEST_BYTES, 1)
    try:
        while data and not data.endswith(b"\n"):
            more = caller.recv(MAX_REQUEST_BYTES)
            if not more or len(data) > MAX_REQUEST_BYTES:
                raise ValueError("the request breaks off")
            data += more
        if data and not descriptors:
            raise ValueError("the request has no place for output")
    except (OSError, ValueError):
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return data, descriptors[0] if descriptors else -1


def _hung_up(caller: socket.socket) -> bool:
    return bool(select.select([caller], [], [], 0)[0]) and not caller.recv(1, socket.MSG_PEEK)


@contextlib.contextmanager
def noted_reads() -> Iterator[set[str]]:
    """The names of the variables that Python code reads meanwhile."""
    kind = type(os.environ)
    original = kind.__getitem__
    names: set[str] = set()

    def noted(environ: Any, key: str) -> str:
        names.add(key)
        return original(environ, key)

    kind.__getitem__ = noted  # type: ignore[method-assign]
    try:
        yield names
    finally:
        kind.__getitem__ = original  # type: ignore[method-assign]


def set_title(title: str) -> None:
    """What `ps` shows, where the engine's environment has the package for it."""
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").setproctitle(title)


def installed(package: str) -> tuple[float, ...]:
    """When something was last installed or removed where a package lies, and the package itself."""
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    return tuple(folder.stat().st_mtime for path in folders for folder in (path, path.parent))


def threads() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/task"))


def private_bytes() -> int:
    """What this process holds for itself, in bytes."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Import, then serve; in a child, be the engine."""
    name, descriptor = sys.argv[1:]
    set_title(f"llmrun: warm parent of {name}")  # before the environment changes: the title needs its place
    listener = socket.socket(fileno=int(descriptor))
    began = time.monotonic()
    # What the keeper set for the start of this process only.
    if before := os.environ.pop(LD_PRELOAD_BEFORE, ""):
        os.environ["LD_PRELOAD"] = before
    else:
        os.environ.pop("LD_PRELOAD", None)
    env = dict(os.environ)
    os.environ.update(ONE_THREAD)
    with noted_reads() as read:
        module = importlib.import_module(name)
        module.preload()
    if threads() > 1:
        sys.exit(f"after its imports the warm parent has {threads()} threads: it cannot fork safely")
    gc.collect()
    gc.freeze()  # what was imported is never looked at again: a child's collector leaves its pages shared
    print(f"warm parent {os.getpid()} has imported {name} in {time.monotonic() - began:.1f} s", flush=True)
    request = ForkServer(module, listener, frozenset(read), env).serve()
    if request:
        request.become(name)
        module.main()


if __name__ == "__main__":
    main()
