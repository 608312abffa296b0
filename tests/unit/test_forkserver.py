"""The warm parent and its keeper, with a server of a few lines instead of vLLM; `e2e/test_cold_starts.py` has vLLM's."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmrun.errors import EngineError
from llmrun.spec import ModelSpec
from llmrun_runtime.engines.base import Launch, Loader, Member
from llmrun_runtime.engines.forkserver import prestart
from llmrun_runtime.engines.forkserver.prestart import Prestarts, adopt, prestart_socket
from llmrun_runtime.engines.forkserver.supervisor import ForkServerSupervisor, forkserver_socket
from llmrun_runtime.engines.process.child import UNKNOWN_EXIT, Forked, ForkRefused
from llmrun_runtime.engines.process.engine_process import EngineProcess
from llmrun_runtime.engines.process.fork import fork
from llmrun_runtime.engines.process.start import start_process
from llmrun_runtime.engines.process.temp_dir import sweep_temp_dirs
from tests.support.cluster import until

SERVER = """
import json, os, random, sys, tempfile, time
PACKAGE = "warmthing"
LEARNED = []
LOADED = os.environ.get("READ_AT_IMPORT")
def preload():
    if os.environ.get("THREADS"):
        import threading
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    if os.environ.get("SLOW"):
        time.sleep(float(os.environ["SLOW"]))
def spoilt():
    return ""
def learn(argv):
    LEARNED.append(argv)
def recall(argv):
    if "grow" in argv:
        LEARNED.append(bytearray(range(256)) * 2**20)
def main():
    said = {"argv": sys.argv, "env": dict(os.environ), "pid": os.getpid(), "sid": os.getsid(0),
        "random": random.random(), "tmp": tempfile.gettempdir(), "ppid": os.getppid(),
        "fds": sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if int(n) > 2
            and os.path.exists(f"/proc/self/fd/{n}"))}
    print("said", json.dumps(said), flush=True)
    if "hold" in sys.argv:
        from llmrun_runtime.engines import lease
        lease.hold()
        lease.tell(port=1, ready=True)
    if "raise" in sys.argv:
        raise ValueError("no such dtype")
    if "exit" in sys.argv:
        sys.exit(3)
    time.sleep(600)
if __name__ == "__main__":
    main()
"""


class Thing:
    """An engine whose server is SERVER."""

    name = "thing"
    module = "warmthing.server"
    paths = frozenset[str]()

    def refuses(self, spec: ModelSpec) -> str:
        return ""

    def command(self, launch: Launch) -> list[str]:
        return [launch.python, "-m", self.module, *self.arguments(launch)]

    def arguments(self, launch: Launch) -> list[str]:
        return [launch.weights]

    def libraries(self) -> tuple[str, ...]:
        return ()

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        return {}

    def loader(self, app: Any, max_rank: int) -> Loader:
        raise EngineError("no adapters")

    def root_cause(self, log: str) -> str:
        return next((line for line in log.splitlines() if line.startswith("ValueError")), "")


class Node:
    """A keeper and what is needed to ask it."""

    def __init__(self, folder: Path, **env: str) -> None:
        package = folder / "site" / "warmthing"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "server.py").write_text(SERVER)
        self.folder = folder
        paths = [str(package.parent), *filter(None, sys.path)]
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env}
        self.socket = forkserver_socket(folder, "node", "thing")
        self.output = folder / "warm.log"
        self.keeper = ForkServerSupervisor(Thing(), self.socket, self.output, self.env)

    async def fork(self, *argv: str, **env: str) -> tuple[Forked, dict[str, Any]]:
        """A child and what it says of itself."""
        path = self.folder / f"{time.monotonic_ns()}.log"
        with path.open("ab") as log:
            child = await asyncio.to_thread(fork, self.socket, argv, {**self.env, **env}, log, "llmrun: thing")
        said = await eventually(lambda: path.read_text().partition("said ")[2].partition("\n")[0])
        data: dict[str, Any] = json.loads(said)
        return child, data

    def launch(self, log: Path) -> Launch:
        """What an engine that holds its lease is started from."""
        return Launch(
            names=("one",),
            weights="hold",
            members=(Member("n", "127.0.0.1"),),
            engine_args={},
            python=sys.executable,
            env=self.env,
            log=log,
            warm=self.socket,
        )

    def parents(self) -> list[psutil.Process]:
        """The warm parents that live."""
        found = []
        for process in psutil.Process().children():
            try:
                if "llmrun: warm parent" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def contains(path: Path, text: str) -> bool:
    """Whether the file has the text."""
    return text in path.read_text()


async def eventually(condition: Callable[[], Any]) -> Any:
    """`until` beside the event loop, which keeps the parent."""
    return await asyncio.to_thread(until, condition, 20, "it came about")


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """A node with a warm parent."""
    node = Node(tmp_path)
    node.keeper.start()
    yield node
    await node.keeper.close()
    await eventually(lambda: not node.parents())
    assert not list(node.socket.parent.glob("*"))


async def test_a_child_is_as_if_it_had_been_started(node: Node) -> None:
    first, said = await node.fork("--x", "1", NAME="one", TMPDIR=str(node.folder), CUDA_VISIBLE_DEVICES="3")
    other, theirs = await node.fork()
    assert node.socket.stat().st_mode & 0o777 == 0o600 and node.socket.parent.stat().st_mode & 0o777 == 0o700
    assert said["argv"] == ["warmthing.server", "--x", "1"] and theirs["argv"] == ["warmthing.server"]
    assert said["env"]["NAME"] == "one" and said["env"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert theirs["env"] == node.env
    assert said["tmp"] == str(node.folder)
    assert said["pid"] == said["sid"] == first.pid != other.pid
    (parent,) = node.parents()
    assert said["ppid"] == parent.pid and parent.num_threads() == 1
    assert said["random"] != theirs["random"]
    assert not [name for name in said["fds"] + theirs["fds"] if name.startswith(("socket:", "pipe:"))]
    for child in (first, other):
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(child.wait, 5) and child.poll() == -signal.SIGTERM
        child.close()


async def test_exit_codes_and_tracebacks_arrive(node: Node) -> None:
    for word, code in (("exit", 3), ("raise", 1)):
        child, _ = await node.fork(word)
        assert await asyncio.to_thread(child.wait, 5) and child.poll() == code
        child.close()
    assert "ValueError: no such dtype" in "".join(log.read_text() for log in node.folder.glob("*.log"))


async def test_children_outlive_their_parent_and_the_keeper_starts_another(node: Node) -> None:
    child, _ = await node.fork()
    (parent,) = node.parents()
    parent.kill()
    await eventually(lambda: parent not in node.parents())
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert await asyncio.to_thread(child.wait, 5) and child.poll() == UNKNOWN_EXIT
    child.close()
    with pytest.raises(ForkRefused):  # a short life: there is a pause
        await node.fork()
    node.keeper.start()


async def test_requests_wait_for_a_parent_that_still_imports(tmp_path: Path) -> None:
    node = Node(tmp_path, SLOW="1.5")
    node.keeper.start()
    begun = time.monotonic()
    found = await asyncio.gather(*(node.fork(str(n)) for n in range(5)))
    assert 1 < time.monotonic() - begun < 15
    assert sorted(said["argv"][1] for _, said in found) == list("01234")
    for child, _ in found:
        child.send_signal(signal.SIGKILL)
        assert await asyncio.to_thread(child.wait, 5)
        child.close()
    await node.keeper.close()


async def test_an_environment_that_imports_have_read_is_refused(node: Node) -> None:
    with pytest.raises(ForkRefused, match="differs in READ_AT_IMPORT, which imports have read"):
        await node.fork(READ_AT_IMPORT="other")
    with pytest.raises(ForkRefused, match="differs in OMP_NUM_THREADS, PYTHONPATH"):
        await node.fork(PYTHONPATH="/elsewhere", OMP_NUM_THREADS="7")


@pytest.mark.parametrize("how", ["reinstalled", "grown"])
async def test_a_worn_parent_is_replaced(node: Node, how: str) -> None:
    child, _ = await node.fork("grow" if how == "grown" else "x")
    (parent,) = node.parents()
    if how == "reinstalled":
        (node.folder / "site" / "other-1.0.dist-info").mkdir()
    await eventually(lambda: parent not in node.parents())
    assert {"grown": "it has grown", "reinstalled": "installed anew"}[how] in node.output.read_text()
    child.send_signal(signal.SIGKILL)
    assert await asyncio.to_thread(child.wait, 5)
    child.close()


async def test_a_parent_with_threads_is_none(tmp_path: Path) -> None:
    node = Node(tmp_path, THREADS="1")
    node.keeper.start()
    with pytest.raises(ForkRefused):
        await node.fork()
    assert "2 threads: it cannot fork safely" in node.output.read_text()
    await node.keeper.close()


async def test_the_parent_ends_with_its_keeper(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from tests.test_warm import Node
async def main():
    node = Node(Path({str(tmp_path)!r}))
    node.keeper.start()
    child, said = await node.fork()
    print(said["ppid"], said["pid"], flush=True)
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
    parent, child = map(int, (await asyncio.wait_for(agent.stdout.readline(), 20)).split())
    agent.kill()
    await agent.wait()
    await eventually(lambda: not psutil.pid_exists(parent) or psutil.Process(parent).status() == psutil.STATUS_ZOMBIE)
    assert psutil.Process(child).is_running()  # an engine has its lease for that
    os.kill(child, signal.SIGKILL)
    stale = forkserver_socket(tmp_path, "node", "thing")
    assert stale.exists()
    with pytest.raises(ForkRefused, match="ConnectionRefusedError"):
        fork(stale, [], {}, sys.stderr.buffer, "")
    other = Node(tmp_path / "other")
    other.keeper._path = stale.with_name("other.sock")
    other.keeper.start()
    assert not stale.exists()
    await other.keeper.close()


async def test_an_engine_that_cannot_be_forked_starts_as_a_plain_process(node: Node) -> None:
    for env, forked in ((node.env, True), ({**node.env, "READ_AT_IMPORT": "other"}, False)):
        log = node.folder / f"engine-{forked}.log"
        engine = EngineProcess(Thing(), replace(node.launch(log), env=env))
        await engine.start()
        assert engine.forked is forked
        await eventually(functools.partial(contains, log, '"hold"'))
        assert ("the engine starts as a plain process: its environment differs" in log.read_text()) is not forked
        await engine.end()
        assert not psutil.pid_exists(engine.pid) or psutil.Process(engine.pid).status() == psutil.STATUS_ZOMBIE


def lives(pid: int) -> bool:
    """Whether the process runs."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_a_head_start_goes_to_the_replica_that_asks_for_it(node: Node) -> None:
    path = prestart_socket(node.folder, "node")
    heads = Prestarts(path)
    for _ in range(2):  # one engine, however often it is asked for
        heads.start("one v1", Thing(), node.launch(node.folder / "engine.log"))
    assert await asyncio.to_thread(adopt, path, "other v1") is None
    begun = await asyncio.to_thread(adopt, path, "one v1")
    assert begun and begun.forked and begun.scratch.path.is_dir()
    assert await asyncio.to_thread(adopt, path, "one v1") is None
    engine = EngineProcess(Thing(), node.launch(node.folder / "other.log"), begun)
    await engine.start()
    await eventually(lambda: engine.port == 1)  # it has spoken through the lease
    await heads.close()
    sweep_temp_dirs()
    assert lives(engine.pid) and begun.scratch.path.is_dir() and not path.exists()
    await engine.end()
    assert not lives(engine.pid) and not begun.scratch.path.exists()


async def test_a_head_start_that_no_replica_takes_is_ended(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prestart, "WAIT_S", 1)
    log = node.folder / "engine.log"
    heads = Prestarts(prestart_socket(node.folder, "node"))
    heads.start("one v1", Thing(), node.launch(log))
    await eventually(lambda: log.exists() and "said" in log.read_text())
    said = json.loads(log.read_text().partition("said ")[2].partition("\n")[0])
    assert lives(said["pid"]) and Path(said["tmp"]).is_dir()
    await eventually(lambda: not lives(said["pid"]))
    assert not log.exists() and not Path(said["tmp"]).exists()
    await heads.close()


async def test_an_engine_ends_when_who_began_it_and_its_replica_are_gone(node: Node) -> None:
    begun = await start_process(Thing(), node.launch(node.folder / "engine.log"), spawn=False)
    await eventually(lambda: "said" in begun.log.read_text())
    begun.lease.close()
    os.close(begun.scratch.lock)
    assert await asyncio.to_thread(begun.child.wait, 10)
    assert "the replica" in begun.log.read_text()
    sweep_temp_dirs()
    assert not begun.scratch.path.exists()
    begun.child.close()
    with pytest.raises(ForkRefused):
        await start_process(Thing(), replace(node.launch(begun.log), warm=None), spawn=False)


async def test_strangers_cannot_upset_the_parent(node: Node) -> None:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(os.path.relpath(node.socket))
        caller.sendall(b"hello\n")
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(os.path.relpath(node.socket))
        child, _ = await node.fork()
    child.send_signal(signal.SIGKILL)
    assert await asyncio.to_thread(child.wait, 5)
    child.close()
