"""`python -m llmrun_runtime.engines.forkserver.server MODULE FD POLL_S`: imports an engine's server once, and forks it.

MODULE is the module that the engine's command runs. The fork server uses these names of it:

- `PACKAGE`: the package whose reinstallation makes this process out of date
- `preload()`: import everything that does not depend on the model
- `cache_model(argv)`: some time after a fork, import and keep what that child needed in addition
- `drop_stale(argv)`: before a fork, drop what was cached from files that have changed; return whether there was any
- `clear_cache()`: drop all that was cached
- `fork_problem()`: return why children could not serve; "" if they can
- `main()`: in a child, serve `sys.argv`

FD is a listening Unix socket. The node agent owns it, so requests queue while a fork server imports or is replaced.
A request is one JSON line, with a file descriptor for the child's output. The reply is `{"pid": …}` with a pidfd and
later `{"exit": …}`; or `{"refused": reason}`, and the client starts the engine as a plain process.

The process has a single thread, so no lock is held at a fork, and it never touches a device. It exits when its
standard input closes (the agent has exited), when PACKAGE was reinstalled, and when its memory has grown; it checks the
last two every POLL_S seconds. The agent then starts another one.
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

from llmrun_runtime.engines.shim.output import ignore_write_errors

# C code reads these when it is loaded; `recorded_env_reads` cannot observe that.
READ_BY_C_CODE = (
    *("CUDA_", "GOMP_", "KMP_", "LD_", "MALLOC_", "MKL_", "NCCL_", "OMP_", "OPENBLAS_"),
    *("PYTHON", "PYTORCH_", "TORCH_", "TZ"),
)
# These differ between engines and take effect in a child: `ForkRequest.become`.
PER_CHILD = frozenset({"TMPDIR", "CUDA_VISIBLE_DEVICES", "PYTHONUNBUFFERED"})
LD_PRELOAD_BEFORE = "LLMRUN_LD_PRELOAD"
# numpy's OpenBLAS starts its threads when it is loaded; OpenMP starts its own in a child's first parallel loop.
SINGLE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
REQUEST_TIMEOUT_S = 2.0
# A child has started by then and no longer needs all cores.
CACHE_DELAY_S = 10.0
MAX_REQUEST_BYTES = 2**20
# Covers the imports of single models and the allocator's slack; more growth is a leak.
MAX_GROWTH = 1.25
# With the caches of models, of the memory after the imports (about 450 MiB); one model takes about 90 MiB.
MAX_CACHED = 2.0


@dataclass(frozen=True)
class ForkRequest:
    """The arguments, complete environment, output descriptor and title of a child."""

    argv: list[str]
    env: dict[str, str]
    output: int
    title: str = ""

    def become(self, module: str) -> None:
        """Make this process, just forked, look as if it had been started with these."""
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
        tempfile.tempdir = None  # determined again from the child's TMPDIR
        time.tzset()
        for name, reseed in (("numpy.random", "seed"), ("torch", "seed")):  # Python reseeds its own generator
            if name in sys.modules:
                getattr(sys.modules[name], reseed)()


class ForkServer:
    """Forks a child per request. `env_reads`: variables that imports have read, so children cannot change them."""

    def __init__(
        self,
        module: Any,
        listener: socket.socket,
        env_reads: frozenset[str],
        env: Mapping[str, str],
        poll_s: float,
    ) -> None:
        self._module = module
        self._listener = listener
        self._env_reads = env_reads
        self._poll_s = poll_s
        self._env = dict(env)
        changed = {key: value for key, value in os.environ.items() if env.get(key) != value}
        self._env_writes = {key: value for key, value in changed.items() if key not in SINGLE_THREAD}
        """Variables that imports have set; the imports of a plain start would set them too."""
        self._install_times = install_times(module.PACKAGE)
        self._imported_bytes = self._baseline_bytes = private_bytes()
        self._clients: dict[int, socket.socket] = {}
        """The connections that wait for an exit code, by process id."""
        self._uncached_argv: list[str] = []
        self._cache_at = 0.0
        self._dropped = False
        """Whether something that was cached has been dropped, but not been collected."""
        self._wakeup, self._woken = socket.socketpair()

    def serve(self) -> ForkRequest | None:
        """Serve until this process should exit: None. In a child: the request to become."""
        for sock in (self._wakeup, self._woken, self._listener):
            sock.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            sources = [0, self._listener.fileno(), self._wakeup.fileno()]
            ready, _, _ = select.select(sources, [], [], self._poll_s)
            if self._wakeup.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wakeup.recv(4096)
                self._reap()
            if 0 in ready and not os.read(0, 1):
                return None
            if reason := self._exit_reason():
                print(f"fork server {os.getpid()} exits: {reason}", flush=True)
                return None
            if self._listener.fileno() in ready and (request := self._handle_connection()):
                return request
            if self._uncached_argv and time.monotonic() > self._cache_at:
                self._cache_last_model()

    def _cache_last_model(self) -> None:
        """Import and keep what the last child needed in addition, for the next child like it."""
        self._module.cache_model(self._uncached_argv)
        self._uncached_argv = []
        self._collect()
        if private_bytes() > MAX_CACHED * self._imported_bytes:
            self._module.clear_cache()
            self._dropped = True
            self._collect()
        self._baseline_bytes = max(self._baseline_bytes, private_bytes())
        print(f"fork server {os.getpid()} has cached the last model", flush=True)

    def _collect(self) -> None:
        """Free what was dropped, and exclude the rest from collections, so children keep sharing its pages."""
        if self._dropped:  # a collection of all objects takes 0.5 s and unshares their pages
            gc.unfreeze()
            self._dropped = False
        gc.collect()
        gc.freeze()

    def _exit_reason(self) -> str:
        """Return why this fork server must be replaced; "" if it is still good."""
        if install_times(self._module.PACKAGE) != self._install_times:
            return f"{self._module.PACKAGE} or a package next to it was reinstalled"
        if thread_count() > 1:
            return f"it has {threads()} and cannot fork safely"
        if problem := self._module.fork_problem():
            return str(problem)
        if private_bytes() > MAX_GROWTH * self._baseline_bytes:
            return "its memory has grown"
        return ""

    def _handle_connection(self) -> ForkRequest | None:
        """Handle one client; in the child that is forked for it, return the request."""
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return None
        client.settimeout(REQUEST_TIMEOUT_S)
        output = pid = -1
        try:
            data, output = _receive(client)
            if not data:
                raise ConnectionAbortedError("the client only tested whether the socket is listening")
            payload = json.loads(data)
            env = {str(key): str(value) for key, value in payload["env"].items()}
            request = ForkRequest(list(payload["argv"]), {**self._env_writes, **env}, output, str(payload["title"]))
            if _hung_up(client):
                raise ConnectionAbortedError("the client closed the connection")
            if reason := self._env_mismatch(env):
                client.sendall(json.dumps({"refused": reason}).encode() + b"\n")
                client.close()
                return None
            self._dropped |= self._module.drop_stale(request.argv)
            self._uncached_argv, self._cache_at = request.argv, time.monotonic() + CACHE_DELAY_S
            pid = os.fork()
            if not pid:
                self._close_inherited(client)
                return request
            self._clients[pid] = client
            pidfd = os.pidfd_open(pid)
            try:
                socket.send_fds(client, [json.dumps({"pid": pid}).encode() + b"\n"], [pidfd])
            finally:
                os.close(pidfd)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # closed, or a stranger
            if not isinstance(error, ConnectionAbortedError):
                print(f"a request failed: {error!r}", flush=True)
            if client not in self._clients.values():
                client.close()
        finally:
            if output >= 0 and pid:
                os.close(output)
        return None

    def _env_mismatch(self, env: Mapping[str, str]) -> str:
        """Return why a child cannot have this environment; "" if it can."""
        names = {name for name in {*env, *self._env} if name in self._env_reads or name.startswith(READ_BY_C_CODE)}
        own = {name for name in names if name in PER_CHILD or name.startswith("LLMRUN_")}
        other = sorted(name for name in names - own if env.get(name) != self._env.get(name))
        return f"its environment differs in {', '.join(other)}, which imports have read" if other else ""

    def _close_inherited(self, client: socket.socket) -> None:
        """In the child: close the fork server's descriptors."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for sock in (client, self._listener, self._wakeup, self._woken, *self._clients.values()):
            sock.close()
        self._clients.clear()

    def _reap(self) -> None:
        """Send the exit codes of children that have exited to their clients."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            client = self._clients.pop(pid, None)
            if client:
                with contextlib.suppress(OSError):
                    client.sendall(json.dumps({"exit": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                client.close()


def _receive(client: socket.socket) -> tuple[bytes, int]:
    """Return one line and the descriptor sent with it; b"" if the client sent nothing. Raises OSError, ValueError."""
    data, descriptors, _, _ = socket.recv_fds(client, MAX_REQUEST_BYTES, 1)
    try:
        while data and not data.endswith(b"\n"):
            more = client.recv(MAX_REQUEST_BYTES)
            if not more or len(data) > MAX_REQUEST_BYTES:
                raise ValueError("the request is truncated or too large")
            data += more
        if data and not descriptors:
            raise ValueError("the request has no output descriptor")
    except (OSError, ValueError):
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return data, descriptors[0] if descriptors else -1


def _hung_up(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0]) and not client.recv(1, socket.MSG_PEEK)


@contextlib.contextmanager
def recorded_env_reads() -> Iterator[set[str]]:
    """Yield a set that collects the names of the environment variables that Python code reads in this context."""
    kind = type(os.environ)
    original = kind.__getitem__
    names: set[str] = set()

    def recording(environ: Any, key: str) -> str:
        names.add(key)
        return original(environ, key)

    kind.__getitem__ = recording  # type: ignore[method-assign]
    try:
        yield names
    finally:
        kind.__getitem__ = original  # type: ignore[method-assign]


def set_title(title: str) -> None:
    """Set the title that `ps` shows, if `setproctitle` is installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").setproctitle(title)


def install_times(package: str) -> tuple[float, ...]:
    """Return when a package and its site directory were last changed."""
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    return tuple(folder.stat().st_mtime for path in folders for folder in (path, path.parent))


def thread_count() -> int:
    """Return the number of threads of this process."""
    return len(os.listdir("/proc/self/task"))


def threads() -> str:
    """Return the number of this process's threads, and their names, which tell who started them."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return f"{len(names)} threads ({', '.join(names)})"


def private_bytes() -> int:
    """Return the resident memory that this process does not share with others, in bytes."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Import, then serve; in a child, run the engine."""
    ignore_write_errors()
    name, descriptor, poll_s = sys.argv[1:]
    set_title(f"llmrun: fork server of {name}")  # before the environment changes: the title overwrites its memory
    listener = socket.socket(fileno=int(descriptor))
    started = time.monotonic()
    # The supervisor's LD_PRELOAD is for this process only.
    if before := os.environ.pop(LD_PRELOAD_BEFORE, ""):
        os.environ["LD_PRELOAD"] = before
    else:
        os.environ.pop("LD_PRELOAD", None)
    env = dict(os.environ)
    os.environ.update(SINGLE_THREAD)
    with recorded_env_reads() as env_reads:
        module = importlib.import_module(name)
        module.preload()
    if thread_count() > 1:
        sys.exit(f"after its imports the fork server has {threads()} and cannot fork safely")
    gc.collect()
    gc.freeze()  # excludes what was imported from collections, so children keep sharing its pages
    print(f"fork server {os.getpid()} has imported {name} in {time.monotonic() - started:.1f} s", flush=True)
    request = ForkServer(module, listener, frozenset(env_reads), env, float(poll_s)).serve()
    if request:
        request.become(name)
        module.main()


if __name__ == "__main__":
    main()
