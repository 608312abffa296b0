"""The fork server and its supervisor, with a small server; `e2e/test_cold_starts.py` tests vLLM's."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmrun.errors import EngineError
from llmrun.spec import ModelSpec
from llmrun_runtime.engines.base import LOOPBACK_ONLY, Launch, Loader, Member
from llmrun_runtime.engines.forkserver import prestart
from llmrun_runtime.engines.forkserver import supervisor as forkserver_supervisor
from llmrun_runtime.engines.forkserver.prestart import Prestarts, adopt, prestart_socket
from llmrun_runtime.engines.forkserver.supervisor import ForkServerSupervisor, forkserver_socket
from llmrun_runtime.engines.process import start
from llmrun_runtime.engines.process.child import UNKNOWN_EXIT, Forked, ForkRefused
from llmrun_runtime.engines.process.engine_process import EngineProcess
from llmrun_runtime.engines.process.fork import fork
from llmrun_runtime.engines.process.start import start_process
from llmrun_runtime.engines.process.temp_dir import sweep_temp_dirs
from tests.support.cluster import until

SERVER = """
import json, os, random, sys, tempfile, time
PACKAGE = "preloaded"
CACHED = []
LOADED = os.environ.get("READ_AT_IMPORT")
def preload():
    if os.environ.get("THREADS"):
        import threading
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    if os.environ.get("SLOW"):
        time.sleep(float(os.environ["SLOW"]))
def fork_problem():
    return ""
def cache_model(argv):
    CACHED.append(argv)
def drop_stale(argv):
    if "grow" in argv:
        CACHED.append(bytearray(range(256)) * 2**20)
    return False
def main():
    report = {"argv": sys.argv, "env": dict(os.environ), "pid": os.getpid(), "sid": os.getsid(0),
        "random": random.random(), "tmp": tempfile.gettempdir(), "ppid": os.getppid(),
        "fds": sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if int(n) > 2
            and os.path.exists(f"/proc/self/fd/{n}"))}
    print("report", json.dumps(report), flush=True)
    if "hold" in sys.argv:
        from llmrun_runtime.engines.api import hold, notify
        hold()
        notify(port=1, ready=True)
    if "raise" in sys.argv:
        raise ValueError("no such dtype")
    if "exit" in sys.argv:
        sys.exit(3)
    time.sleep(600)
if __name__ == "__main__":
    main()
"""


CACHES = """
import socket, sys
from types import SimpleNamespace
from llmrun_runtime.engines.forkserver.server import MAX_CACHED, ForkServer, private_bytes
class Tokenizer:
    def __init__(self):
        self.owner, self.data = self, bytearray(range(256)) * (20 * 2**12)  # 20 MiB, in a cycle
imports = bytearray(range(256)) * (100 * 2**12)
cached = {}
def clear():
    stale = bool(cached)
    cached.clear()
    return stale
module = SimpleNamespace(PACKAGE="json", fork_problem=lambda: "", clear_cache=clear,
    cache_model=lambda argv: cached.setdefault(argv[0], Tokenizer()), drop_stale=lambda argv: clear())
server = ForkServer(module, socket.socket(), frozenset(), {}, 1)
first = private_bytes()
for number in range(40):
    if sys.argv[1] == "changed":
        server._dropped |= module.drop_stale([])
    server._uncached_argv = [f"model {number}"]
    server._cache_last_model()
    print(f"{(private_bytes() - first) / 2**20:.0f} MiB, {len(cached)} models")
    assert private_bytes() - first < (MAX_CACHED - 1) * first + 25 * 2**20, number
    assert not server._exit_reason()
"""


class ThingEngine:
    """An engine whose server is SERVER."""

    name = "thing"
    module = "preloaded.server"
    paths = probe_paths = frozenset[str]()

    def refuses(self, spec: ModelSpec) -> str:
        return ""

    def warning(self, launch: Launch, paths: Collection[str]) -> str:
        return ""

    def command(self, launch: Launch) -> list[str]:
        return [launch.python, "-m", self.module, *self.arguments(launch)]

    def arguments(self, launch: Launch) -> list[str]:
        return [launch.weights]

    def libraries(self) -> tuple[str, ...]:
        return ()

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        return {}

    def loader(self, app: Any, max_lora_rank: int) -> Loader:
        raise EngineError("no adapters")

    def has_ended(self, app: Any) -> bool:
        return False

    def root_cause(self, log: str) -> str:
        return next((line for line in log.splitlines() if line.startswith("ValueError")), "")


class Node:
    """A supervisor, and clients of its fork server."""

    def __init__(self, folder: Path, **env: str) -> None:
        package = folder / "site" / "preloaded"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "server.py").write_text(SERVER)
        self.folder = folder
        paths = [str(package.parent), *filter(None, sys.path)]
        self.env = {**LOOPBACK_ONLY, **os.environ, "PYTHONPATH": os.pathsep.join(paths), **env}
        self.socket = forkserver_socket(folder, "node", "thing")
        self.output = folder / "forkserver.log"
        self.supervisor = ForkServerSupervisor(ThingEngine(), self.socket, self.output, self.env, poll_s=0.2)

    async def fork(self, *argv: str, **env: str) -> tuple[Forked, dict[str, Any]]:
        """Fork a child; return it and its report."""
        path = self.folder / f"{time.monotonic_ns()}.log"
        with path.open("ab") as log:
            child = await asyncio.to_thread(fork, self.socket, argv, {**self.env, **env}, log, "llmrun: thing")
        text = await eventually(lambda: path.read_text().partition("report ")[2].partition("\n")[0])
        report: dict[str, Any] = json.loads(text)
        return child, report

    def launch(self, log: Path) -> Launch:
        """Return the launch of an engine that holds its lease."""
        return Launch(
            names=("one",),
            weights="hold",
            members=(Member("n", "127.0.0.1"),),
            engine_args={},
            python=sys.executable,
            env=self.env,
            log=log,
            forkserver=self.socket,
        )

    def servers(self) -> list[psutil.Process]:
        """Return the running fork servers."""
        servers = []
        for process in psutil.Process().children():
            try:
                if "llmrun: fork server" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    servers.append(process)
            except psutil.Error:
                continue
        return servers


def contains(path: Path, text: str) -> bool:
    """Return whether the file contains the text."""
    return text in path.read_text()


async def eventually(condition: Callable[[], Any]) -> Any:
    """`until` in a thread, because the event loop runs the supervisor."""
    return await asyncio.to_thread(until, condition, 20, "the condition is met")


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """A node with a fork server."""
    node = Node(tmp_path)
    node.supervisor.start()
    yield node
    await node.supervisor.close()
    await eventually(lambda: not node.servers())
    assert not list(node.socket.parent.glob("*"))


async def test_a_child_is_like_a_plain_process(node: Node) -> None:
    first, report = await node.fork("--x", "1", NAME="one", TMPDIR=str(node.folder), CUDA_VISIBLE_DEVICES="3")
    other, other_report = await node.fork()
    assert node.socket.stat().st_mode & 0o777 == 0o600 and node.socket.parent.stat().st_mode & 0o777 == 0o700
    assert report["argv"] == ["preloaded.server", "--x", "1"] and other_report["argv"] == ["preloaded.server"]
    assert report["env"]["NAME"] == "one" and report["env"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert other_report["env"] == node.env
    assert report["tmp"] == str(node.folder)
    assert report["pid"] == report["sid"] == first.pid != other.pid
    (server,) = node.servers()
    assert report["ppid"] == server.pid and server.num_threads() == 1
    assert report["random"] != other_report["random"]
    assert not [name for name in report["fds"] + other_report["fds"] if name.startswith(("socket:", "pipe:"))]
    for child in (first, other):
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(child.wait, 5) and child.poll() == -signal.SIGTERM
        child.close()


async def test_exit_codes_and_tracebacks_are_delivered(node: Node) -> None:
    for word, code in (("exit", 3), ("raise", 1)):
        child, _ = await node.fork(word)
        assert await asyncio.to_thread(child.wait, 5) and child.poll() == code
        child.close()
    assert "ValueError: no such dtype" in "".join(log.read_text() for log in node.folder.glob("*.log"))


async def test_children_outlive_their_fork_server(node: Node) -> None:
    child, _ = await node.fork()
    (server,) = node.servers()
    server.kill()
    await eventually(lambda: server not in node.servers())
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert await asyncio.to_thread(child.wait, 5) and child.poll() == UNKNOWN_EXIT
    child.close()
    with pytest.raises(ForkRefused):  # it exited early: the supervisor backs off
        await node.fork()
    node.supervisor.start()


async def test_requests_wait_for_a_fork_server_that_is_importing(tmp_path: Path) -> None:
    node = Node(tmp_path, SLOW="1.5")
    node.supervisor.start()
    started = time.monotonic()
    children = await asyncio.gather(*(node.fork(str(n)) for n in range(5)))
    assert 1 < time.monotonic() - started < 15
    assert sorted(report["argv"][1] for _, report in children) == list("01234")
    for child, _ in children:
        child.send_signal(signal.SIGKILL)
        assert await asyncio.to_thread(child.wait, 5)
        child.close()
    await node.supervisor.close()


async def test_an_environment_that_imports_have_read_is_refused(node: Node) -> None:
    with pytest.raises(ForkRefused, match="differs in READ_AT_IMPORT, which imports have read"):
        await node.fork(READ_AT_IMPORT="other")
    with pytest.raises(ForkRefused, match="differs in OMP_NUM_THREADS, PYTHONPATH"):
        await node.fork(PYTHONPATH="/elsewhere", OMP_NUM_THREADS="7")


@pytest.mark.parametrize("how", ["reinstalled", "grown"])
async def test_an_outdated_fork_server_is_replaced(node: Node, how: str) -> None:
    child, _ = await node.fork("grow" if how == "grown" else "x")
    (server,) = node.servers()
    if how == "reinstalled":
        (node.folder / "site" / "other-1.0.dist-info").mkdir()
    await eventually(lambda: server not in node.servers())
    assert {"grown": "its memory has grown", "reinstalled": "was reinstalled"}[how] in node.output.read_text()
    child.send_signal(signal.SIGKILL)
    assert await asyncio.to_thread(child.wait, 5)
    child.close()


async def test_a_fork_server_with_threads_exits(tmp_path: Path) -> None:
    node = Node(tmp_path, THREADS="1")
    node.supervisor.start()
    with pytest.raises(ForkRefused):
        await node.fork()
    assert "2 threads (llmrun: fork se, llmrun: fork se) and cannot fork safely" in node.output.read_text()
    await node.supervisor.close()


async def test_a_fork_server_whose_imports_fail_slowly_has_failed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forkserver_supervisor, "MIN_LIFE_S", 0.0)
    node = Node(tmp_path, THREADS="1")
    supervisor = ForkServerSupervisor(ThingEngine(), node.socket, node.output, node.env, backoff_s=0.1)
    supervisor.start()
    await eventually(lambda: "failed, retrying in 0.2 s" in caplog.text)
    await supervisor.close()
    assert "failed, retrying in 0.1 s: it exited with code 1: after its imports the fork server has" in caplog.text
    assert "cannot fork safely" in node.output.with_suffix(".log.1").read_text()


async def test_the_fork_server_exits_with_its_supervisor(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from tests.unit.test_forkserver import Node
async def main():
    node = Node(Path({str(tmp_path)!r}))
    node.supervisor.start()
    child, report = await node.fork()
    print(report["ppid"], report["pid"], flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    root = str(Path(__file__).parent.parent.parent)
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])},
    )
    assert agent.stdout
    server, child = map(int, (await asyncio.wait_for(agent.stdout.readline(), 20)).split())
    agent.kill()
    await agent.wait()
    await eventually(lambda: not psutil.pid_exists(server) or psutil.Process(server).status() == psutil.STATUS_ZOMBIE)
    assert psutil.Process(child).is_running()  # an engine exits with its lease instead
    os.kill(child, signal.SIGKILL)
    stale = forkserver_socket(tmp_path, "node", "thing")
    assert stale.exists()
    with pytest.raises(ForkRefused, match="ConnectionRefusedError"):
        fork(stale, [], {}, sys.stderr.buffer, "")
    other = Node(tmp_path / "other")
    other.supervisor._path = stale.with_name("other.sock")
    other.supervisor.start()
    assert not stale.exists()
    await other.supervisor.close()


async def test_an_engine_that_cannot_be_forked_starts_as_a_plain_process(node: Node) -> None:
    for env, forked in ((node.env, True), ({**node.env, "READ_AT_IMPORT": "other"}, False)):
        log = node.folder / f"engine-{forked}.log"
        engine = EngineProcess(ThingEngine(), replace(node.launch(log), env=env))
        await engine.start()
        assert engine.forked is forked
        await eventually(functools.partial(contains, log, '"hold"'))
        assert ("starting the engine as a plain process: its environment differs" in log.read_text()) is not forked
        await engine.end()
        assert not psutil.pid_exists(engine.pid) or psutil.Process(engine.pid).status() == psutil.STATUS_ZOMBIE


def alive(pid: int) -> bool:
    """Return whether the process is running."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_a_prestarted_engine_goes_to_its_replica(node: Node) -> None:
    path = prestart_socket(node.folder, "node")
    prestarts = Prestarts(path)
    for _ in range(2):  # a repeated request starts no second engine
        prestarts.start("one v1", ThingEngine(), node.launch(node.folder / "engine.log"))
    assert await asyncio.to_thread(adopt, path, "other v1") is None
    process = await asyncio.to_thread(adopt, path, "one v1")
    assert process and process.forked and process.temp_dir.path.is_dir()
    assert await asyncio.to_thread(adopt, path, "one v1") is None
    engine = EngineProcess(ThingEngine(), node.launch(node.folder / "other.log"), process)
    await engine.start()
    await eventually(lambda: engine.port == 1)  # reported through the lease
    await prestarts.close()
    sweep_temp_dirs()
    assert alive(engine.pid) and process.temp_dir.path.is_dir() and not path.exists()
    await engine.end()
    assert not alive(engine.pid) and not process.temp_dir.path.exists()


async def test_a_prestarted_engine_that_is_not_adopted_is_killed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prestart, "ADOPT_TIMEOUT_S", 1)
    log = node.folder / "engine.log"
    prestarts = Prestarts(prestart_socket(node.folder, "node"))
    prestarts.start("one v1", ThingEngine(), node.launch(log))
    await eventually(lambda: log.exists() and "report" in log.read_text())
    report = json.loads(log.read_text().partition("report ")[2].partition("\n")[0])
    assert alive(report["pid"]) and Path(report["tmp"]).is_dir()
    await eventually(lambda: not alive(report["pid"]))
    await eventually(lambda: not log.exists() and not Path(report["tmp"]).exists())
    await prestarts.close()


async def test_an_engine_exits_without_its_starter_and_its_replica(node: Node) -> None:
    process = await start_process(ThingEngine(), node.launch(node.folder / "engine.log"), spawn=False)
    await eventually(lambda: "report" in process.log.read_text())
    process.lease.close()
    os.close(process.temp_dir.lock)
    assert await asyncio.to_thread(process.child.wait, 10)
    assert "the replica" in process.log.read_text()
    sweep_temp_dirs()
    assert not process.temp_dir.path.exists()
    process.child.close()
    with pytest.raises(ForkRefused):
        await start_process(ThingEngine(), replace(node.launch(process.log), forkserver=None), spawn=False)


async def test_the_fork_server_survives_invalid_clients(node: Node) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.path.relpath(node.socket))
        client.sendall(b"hello\n")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.path.relpath(node.socket))
        child, _ = await node.fork()
    child.send_signal(signal.SIGKILL)
    assert await asyncio.to_thread(child.wait, 5)
    child.close()


async def test_a_fork_server_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.output.write_text("")  # no file can be created below it, as on a full disk
    output = node.output / "warm.log"
    supervisor = ForkServerSupervisor(ThingEngine(), node.socket, output, node.env, backoff_s=0.1)
    supervisor.start()
    await eventually(lambda: not node.socket.exists())  # replicas do not wait for it
    with node.output.with_name("engine.log").open("ab") as log, pytest.raises(ForkRefused):
        fork(node.socket, (), node.env, log, "llmrun: thing")
    node.output.unlink()
    await eventually(node.socket.exists)
    child, _ = await node.fork()
    child.send_signal(signal.SIGKILL)
    child.close()
    await supervisor.close()
    await eventually(lambda: not node.servers())


async def test_a_fork_server_and_its_child_run_with_their_logs_on_a_full_disk(node: Node) -> None:
    node.output.unlink()
    node.output.symlink_to("/dev/full")
    await node.supervisor.close()
    node.supervisor.start()
    path = node.folder / "full.log"
    path.symlink_to("/dev/full")
    engine = EngineProcess(ThingEngine(), node.launch(path))
    await engine.start()
    assert engine.forked
    await eventually(lambda: engine.port == 1)  # reported after its first line
    await engine.end()


async def test_a_process_exits_with_its_replica_if_its_log_is_on_a_full_disk(node: Node) -> None:
    log = node.folder / "full.log"
    log.symlink_to("/dev/full")
    process = await start_process(ThingEngine(), node.launch(log))
    lease, _ = await asyncio.to_thread(process.lease.accept)
    lease.close()
    assert await asyncio.to_thread(process.child.wait, 10)
    process.lease.close()
    process.child.close()
    process.temp_dir.remove()


async def test_a_start_that_is_given_up_leaves_no_descriptor(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    forking, forked = threading.Event(), threading.Event()

    def slow_fork(*args: Any) -> Forked:
        forking.set()
        assert forked.wait(10)
        return fork(*args)

    child, _ = await node.fork("exit")  # its imports are done
    child.close()
    monkeypatch.setattr(start, "fork", slow_fork)
    before = len(os.listdir("/proc/self/fd"))
    starting = asyncio.ensure_future(start_process(ThingEngine(), node.launch(node.folder / "engine.log")))
    await asyncio.to_thread(forking.wait, 10)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    forked.set()
    await eventually(lambda: len(os.listdir("/proc/self/fd")) == before)


@pytest.mark.parametrize("how", ["others", "changed"])
def test_caches_of_models_are_bounded(how: str) -> None:
    """Frozen objects in cycles would never be freed: each change of a model's files would leak its tokenizers."""
    done = subprocess.run([sys.executable, "-c", CACHES, how], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    assert ("1 models" in done.stdout) and (how == "changed") == ("2 models" not in done.stdout)
