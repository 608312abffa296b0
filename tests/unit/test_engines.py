"""Engine code without an engine: flags, root causes, hooks, the lease, the public interface."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from llmrun.context import RequestContext
from llmrun.errors import EngineError, HookError
from llmrun.spec import ModelSpec
from llmrun_runtime.engines import api, registry
from llmrun_runtime.engines.base import Launch, Loader, Member, ShimConfig, to_flags
from llmrun_runtime.engines.process.engine_process import EngineProcess, ForkFailed
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.engines.shim.hooks import Hooks
from llmrun_runtime.engines.sidecar import engine as sidecar
from llmrun_runtime.engines.sidecar.server import Sidecar
from llmrun_runtime.engines.vllm import engine as vllm
from llmrun_runtime.engines.vllm.engine import cpu_defaults
from llmrun_runtime.logs import KEEP_FILES, log_path
from tests.support.cluster import until

VLLM = get_engine("vllm")


def launch(**fields: Any) -> Launch:
    """Return a launch with defaults."""
    defaults: dict[str, Any] = {
        "names": ("one", "org/one"),
        "weights": "/w",
        "members": (Member("n", "10.0.0.1", ("0", "1")),),
        "engine_args": {
            "max_model_len": 8192,
            "enable_x": True,
            "enable_y": False,
            "z": {"a": 1},
            "s": ["p", "q"],
            "d_e.f_g": 1,
        },
        "python": sys.executable,
    }
    return Launch(**(defaults | fields))


def test_the_command_has_names_host_shim_and_flags() -> None:
    line = " ".join(VLLM.command(launch()))
    assert "--model /w --served-model-name one org/one --host 10.0.0.1 --port 0" in line
    assert "--middleware llmrun_runtime.engines.shim.middleware.Shim" in line
    flags = '--max-model-len 8192 --enable-x --no-enable-y --z {"a": 1} --s p q --d-e.f_g 1 --tensor-parallel-size 2'
    assert line.endswith(f"{flags} --allowed-media-domains {vllm.NO_HOST}")
    hosts = " ".join(VLLM.command(launch(engine_args={"allowed_media_domains": ["a.org", "b.org"]})))
    assert hosts.count("--allowed-media-domains") == 1 and "--allowed-media-domains a.org b.org" in hosts
    assert to_flags({"none": None}) == []


def test_tensor_parallelism_uses_the_remaining_gpus() -> None:
    one = (Member("n", "h", ("0", "1", "2", "3")),)

    def flags(engine_args: dict[str, Any], **more: Any) -> str:
        return " ".join(VLLM.command(launch(engine_args=engine_args, **{"members": one, **more})))

    assert "--tensor-parallel-size 4" in flags({})
    assert "--tensor-parallel-size 2" in flags({"pipeline_parallel_size": "2"})
    assert "--tensor-parallel-size" not in flags({"data_parallel_size": 4})
    part = flags({}, members=(Member("n", "h", ("0",)),), gpu_share=0.5)
    assert "--gpu-memory-utilization 0.46" in part and "--tensor-parallel-size" not in part
    assert "--gpu-memory-utilization" not in flags({"kv_cache_memory_bytes": "4G"}, gpu_share=0.5)


def test_members_get_the_address_of_member_0() -> None:
    members = (Member("a", "10.0.0.1", ("0", "1")), Member("b", "10.0.0.2", ("0", "1")))
    first, second = (" ".join(VLLM.command(launch(members=members, member_rank=rank, port=7))) for rank in (0, 1))
    address = "--master-addr 10.0.0.1 --master-port 7 --distributed-executor-backend mp"
    assert f"--nnodes 2 --node-rank 0 {address} --max-model-len" in first and "--tensor-parallel-size 4" in first
    assert f"--nnodes 2 --node-rank 1 {address} --headless --max-model-len" in second


@pytest.mark.parametrize(
    ("installed", "filesystem", "chosen"),
    [
        ({"runai_model_streamer", "fastsafetensors", "instanttensor"}, "ext4", "instanttensor"),
        ({"runai_model_streamer", "fastsafetensors"}, "xfs", "fastsafetensors"),
        ({"runai_model_streamer", "fastsafetensors"}, "nfs4", "runai_streamer"),
        ({"fastsafetensors"}, "fuse.s3fs", "fastsafetensors"),
        (set(), "ext4", ""),
    ],
)
def test_the_load_format_depends_on_filesystem_and_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: set[str], filesystem: str, chosen: str
) -> None:
    monkeypatch.setattr(vllm, "filesystem", lambda path: filesystem)
    monkeypatch.setattr(vllm, "_installed", installed.__contains__)
    assert vllm.load_format(tmp_path, installed.__contains__) == ""  # no safetensors
    (tmp_path / "model.safetensors").write_bytes(b"")
    line = " ".join(VLLM.arguments(launch(weights=str(tmp_path), engine_args={})))
    assert (f"--load-format {chosen}" in line) if chosen else "--load-format" not in line
    explicit = launch(weights=str(tmp_path), engine_args={"load_format": "auto"})
    assert "--load-format auto" in " ".join(VLLM.arguments(explicit))
    on_cpu = launch(weights=str(tmp_path), engine_args={}, members=(Member("n", "h"),))
    assert "--load-format" not in VLLM.arguments(on_cpu)


def test_the_filesystem_of_a_path() -> None:
    assert vllm.filesystem(Path("/proc/self")) == "proc"


def test_a_fast_start_captures_few_graphs_unless_engine_args_set_them() -> None:
    assert "--max-cudagraph-capture-size 16" in " ".join(VLLM.arguments(launch(fast_start=True)))
    for args in ({"enforce_eager": True}, {"cudagraph_capture_sizes": [1, 2]}):
        assert "--max-cudagraph-capture-size" not in VLLM.arguments(launch(fast_start=True, engine_args=args))


def test_each_version_has_its_own_engine_cache() -> None:
    env = VLLM.environment({}, Path("/cache/one/v1"))
    assert env["VLLM_CACHE_ROOT"] == "/cache/one/v1" and env["VLLM_ENABLE_STARTUP_PLAN"] == "1"
    assert VLLM.environment({"VLLM_CACHE_ROOT": "/mine"}, Path("/c"))["VLLM_CACHE_ROOT"] == "/mine"
    assert "VLLM_CACHE_ROOT" not in VLLM.environment({}, None)


def test_cpu_defaults_do_not_override_explicit_flags() -> None:
    flags = cpu_defaults(["--model", "m"])
    assert flags == ["--enforce-eager", "--kv-cache-memory-bytes", "1G", "--distributed-executor-backend", "uni"]
    explicit = ["--no-enforce-eager", "--kv-cache-memory-bytes=2G", "--tensor-parallel-size", "2"]
    assert cpu_defaults(explicit) == []


def test_a_sidecars_server_gets_its_own_flags_and_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's flags, from its documentation: https://docs.sglang.ai/advanced_features/server_arguments.html."""
    sglang = get_engine("sglang")
    with pytest.raises(EngineError, match=r"sglang is not installed on the node: pip install sglang"):
        sglang.command(launch())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    python, _, _, module, json_config, *command = sglang.command(launch(engine_args={"context_length": 4096}))
    assert python == sys.executable and module == sidecar.SIDECAR
    config = sidecar.SidecarConfig.from_json(json_config)
    assert (config.host, config.name, config.model, config.health) == ("10.0.0.1", "one", "one", "/health")
    assert "/v1/chat/completions" in config.paths
    line = " ".join(command)
    assert line.startswith(f"{sys.executable} -P -m sglang.launch_server --model-path /w --served-model-name one ")
    assert line.endswith("--host 127.0.0.1 --port {port} --context-length 4096 --tp-size 2")
    on_cpu = " ".join(sglang.command(launch(members=(Member("n", "::1"),), engine_args={}, task="embed")))
    assert on_cpu.endswith("--device cpu --is-embedding") and "--tp-size" not in on_cpu
    explicit = " ".join(sglang.command(launch(engine_args={"tp_size": 1})))
    assert explicit.count("--tp-size") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lora": "s3://acme/adapters"}, "does not support adapters here"),
        ({"task": "embed"}, "does not support task='embed' here"),
        ({}, ""),
    ],
)
def test_an_engine_refuses_unsupported_options(arguments: dict[str, Any], words: str) -> None:
    spec = ModelSpec.model_validate({"name": "one", "model": "org/one", "engine": "transformers", **arguments})
    refusal = get_engine("transformers").refuses(spec)
    assert words in refusal and bool(words) == bool(refusal)


def test_the_last_exception_of_a_sidecars_server_is_its_root_cause() -> None:
    server = get_engine("transformers")
    log = "Traceback (most recent call last):\nRuntimeError: first\nINFO: x\nValueError: no such dtype\nINFO: y\n"
    assert server.root_cause(log) == "ValueError: no such dtype"
    assert server.root_cause("INFO: all is well\n") == ""


def test_a_sidecar_names_the_servers_model_in_json_and_leaves_forms() -> None:
    """A caller that calls JSON text must not choose which model the server loads."""
    config = sidecar.SidecarConfig("127.0.0.1", "one", "/weights", "/health", (), ())
    app = Sidecar(config)
    assert json.loads(app._with_server_name(b'{"model": "other/model"}')) == {"model": "/weights"}
    for body in (b"", b"[1]", b"--x\r\n\xff", b"text"):
        assert app._with_server_name(body) == body


def test_packages_add_engines_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("mine", f"{__name__}:Mine", registry.GROUP),
        EntryPoint("broken", f"{__name__}:Nobody", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    get_engine.cache_clear()
    try:
        assert isinstance(get_engine("mine"), Mine)
        with pytest.raises(EngineError, match=r"engine='broken'.*failed to load.*AttributeError.*Nobody"):
            get_engine("broken")
    finally:
        get_engine.cache_clear()


def test_an_unknown_engine_is_reported_with_the_available_ones() -> None:
    with pytest.raises(EngineError, match=r"engine='tgi' not found; available: sglang, transformers, vllm"):
        get_engine("tgi")


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            "usage: vllm\nvllm: error: unrecognized arguments: --no 3\n",
            "unrecognized arguments: --no 3",
        ),
        (
            "(EngineCore pid=7) ERROR 11-22 16:00:00 [core.py:1] Traceback (most recent call last):\n"
            "(EngineCore pid=7) ERROR 11-22 16:00:00 [core.py:1] ValueError: No available memory for the cache.\n"
            "(APIServer pid=6) Traceback (most recent call last):\n"
            "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: No available memory for the cache.",
        ),
        (
            "(APIServer pid=6) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "(APIServer pid=6)   Value error, User-specified max_model_len (9) is too large [type=value_error, x]\n",
            "ValueError: User-specified max_model_len (9) is too large",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory.\n", "torch.OutOfMemoryError: CUDA out of memory."),
        ("INFO all is well\n", ""),
    ],
)
def test_root_causes(log: str, cause: str) -> None:
    assert VLLM.root_cause(log) == cause


def hooks(tmp_path: Path, text: str, timeout: float = 1.2) -> Hooks:
    """Return the hooks of a class `Mine` with this body."""
    path = tmp_path / "app.py"
    path.write_text("import asyncio, time\n\nclass Mine:\n" + text)
    return Hooks(ShimConfig("mine", str(path), "Mine", ("on_start", "on_request"), timeout), probe_timeout=0.2)


CONTEXT = RequestContext("/v1/completions")
PLAIN = """
    def on_start(self): self.seen = 0
    def on_request(self, request):
        if request["do"] == "raise": raise ValueError("no such thing")
        if request["do"] == "block": time.sleep(4)
        if request["do"] == "nothing": return None
        if request["do"] == "a set": return {"x": {1}}
        if request["do"] == "exit": raise SystemExit(3)
        if request["do"] == "stop": next(iter([]))
        self.seen += 1
        return {**request, "seen": self.seen}
"""
ASYNC = """
    async def on_start(self): self.lock = asyncio.Lock()
    async def on_request(self, request):
        if request["do"] == "raise": raise ValueError("no such thing")
        if request["do"] == "block": time.sleep(4)
        if request["do"] == "wait": await asyncio.sleep(60)
        async with self.lock: return {**request, "seen": 1}
"""


async def seen(mine: Hooks) -> Any:
    """Return the count that a working hook adds to a request."""
    return json.loads(await mine.apply_to_json({"do": "x"}, CONTEXT))["seen"]


async def test_plain_hooks_share_one_instance(tmp_path: Path) -> None:
    mine = hooks(tmp_path, PLAIN)
    await mine.start()
    assert [await seen(mine), await seen(mine)] == [1, 2]
    with pytest.raises(HookError, match=r"Mine.on_request returned NoneType"):
        await mine.apply_to_json({"do": "nothing"}, CONTEXT)
    with pytest.raises(HookError, match=r"returned a request that is not JSON-serializable: .*set"):
        await mine.apply_to_json({"do": "a set"}, CONTEXT)
    for way in ("exit", "stop"):
        with pytest.raises(HookError, match=r"Mine.on_request raised (SystemExit: 3|StopIteration)"):
            await mine.apply_to_json({"do": way}, CONTEXT)


@pytest.mark.parametrize("body", [PLAIN, ASYNC], ids=["plain", "async"])
async def test_a_hook_that_raises_or_blocks_fails_only_its_own_request(
    tmp_path: Path, body: str, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = hooks(tmp_path, body)
    await mine.start()
    with pytest.raises(HookError, match=r"Mine.on_request raised ValueError: no such thing"):
        await mine.apply_to_json({"do": "raise"}, CONTEXT)
    logged = capfd.readouterr().err
    assert "app.py" in logged and "hooks.py" not in logged

    blocked = asyncio.create_task(mine.apply_to_json({"do": "block"}, CONTEXT))
    await asyncio.sleep(0.05)  # so that the next request arrives while the first one blocks
    assert await seen(mine) == 1
    with pytest.raises(HookError, match=r"timed out after 1.2 s"):
        await blocked
    assert "time.sleep(" in capfd.readouterr().err


async def test_an_async_hook_that_exceeds_its_timeout(tmp_path: Path) -> None:
    mine = hooks(tmp_path, ASYNC)
    await mine.start()
    with pytest.raises(HookError, match="timed out after"):
        await mine.apply_to_json({"do": "wait"}, CONTEXT)
    assert await seen(mine) == 1


async def test_a_failing_on_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(HookError, match=r"Mine.on_start raised ZeroDivisionError: division by zero"):
        await hooks(tmp_path, "    def on_start(self): 1 / 0\n").start()


class Script:
    """An engine that runs a few lines of Python, for tests of processes."""

    name = "script"
    module = ""
    paths = probe_paths = frozenset[str]()

    def __init__(self, text: str) -> None:
        self.text = text

    def refuses(self, spec: ModelSpec) -> str:
        return ""

    def warning(self, launch: Launch, paths: Collection[str]) -> str:
        return ""

    def command(self, launch: Launch) -> list[str]:
        return [launch.python, "-c", self.text]

    def arguments(self, launch: Launch) -> list[str]:
        return []

    def libraries(self) -> tuple[str, ...]:
        return ()

    def environment(self, env: Mapping[str, str], cache: Path | None) -> dict[str, str]:
        return dict(os.environ)

    def loader(self, app: Any, max_lora_rank: int) -> Loader:
        raise EngineError("no adapters")

    def has_ended(self, app: Any) -> bool:
        return False

    def root_cause(self, log: str) -> str:
        return VLLM.root_cause(log)


class Mine(Script):
    """A third-party engine, instantiated without arguments."""

    def __init__(self) -> None:
        super().__init__("")


HOLDERS = """
import os, subprocess, sys, time
from llmrun_runtime.engines.api import hold
hold()
if not os.fork():  # takes its own lease automatically
    pass
elif not sys.argv[1:]:  # a separate process, like those of vLLM
    code = "from llmrun_runtime.engines.api import hold; hold()\\nimport os, time\\n"
    code += "print('pid', os.getpid(), flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print("pid", os.getpid(), flush=True)
time.sleep(600)
"""


def pids(log: Path, count: int) -> list[int]:
    """Return the process ids in the log, once it has `count` of them."""

    def logged() -> list[int] | None:
        lines = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("pid ")]
        return lines if len(lines) == count else None

    numbers: list[int] = until(logged, 20, "the processes have started")
    return numbers


def alive(pid: int) -> bool:
    """Whether a process is running (and not a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_every_process_exits_when_the_engine_is_stopped(tmp_path: Path) -> None:
    engine = EngineProcess(Script(HOLDERS), launch(log=tmp_path / "log"))
    await engine.start()
    started = await asyncio.to_thread(pids, tmp_path / "log", 3)
    await engine.end()
    assert not any(map(alive, started))


REPLICA = """
import asyncio, sys
from pathlib import Path
from llmrun_runtime.engines.process.engine_process import EngineProcess
from tests.unit.test_engines import HOLDERS, Script, launch
async def main():
    engine = EngineProcess(Script(HOLDERS), launch(log=Path(sys.argv[1])))
    await engine.start()
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_kill_9_of_the_replica_ends_all_processes_of_its_engine(tmp_path: Path) -> None:
    root = str(Path(__file__).parent.parent.parent)
    replica = subprocess.Popen(
        [sys.executable, "-c", REPLICA, tmp_path / "log"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])},
    )
    try:
        until((tmp_path / "log").exists, 20, "the engine has a log")
        started = pids(tmp_path / "log", 3)
        assert all(map(alive, started))
    finally:
        replica.kill()
        replica.wait()
    until(lambda: not any(map(alive, started)), 5, "the engine's processes have exited")


async def test_an_engine_that_exits_early_fails_with_its_root_cause(tmp_path: Path) -> None:
    engine = EngineProcess(Script("raise ValueError('no such dtype')"), launch(log=tmp_path / "log"))
    await engine.start()
    with pytest.raises(EngineError, match=r"^ValueError: no such dtype$"):
        await engine.ready(20)
    await engine.end()
    killed = EngineProcess(Script("import os; os.kill(os.getpid(), 9)"), launch(log=tmp_path / "log2"))
    await killed.start()
    with pytest.raises(EngineError, match=r"SIGKILL.*out of memory"):
        await killed.ready(20)
    await killed.end()


async def test_the_start_of_an_unresponsive_engine_times_out(tmp_path: Path) -> None:
    engine = EngineProcess(Script("import time; time.sleep(600)"), launch(log=tmp_path / "log"))
    await engine.start()
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer within 0.3 s \(LLMRUN_START_TIMEOUT\)"):
        await engine.ready(0.3)
    await engine.end()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "hello", [*({"pid": 1, "proof": proof} for proof in ("guess", "gu\u00e9ss", "\ud800")), {"pid": "a"}, {}, ["x"]]
)
async def test_messages_without_the_token_are_ignored(tmp_path: Path, hello: Any) -> None:
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    engine = EngineProcess(Script("import time; time.sleep(600)"), launch(log=tmp_path / "log"))
    await engine.start()
    assert engine._lease
    host, port = engine._lease.sockets[0].getsockname()[:2]
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(json.dumps(hello).encode() + b"\n" + json.dumps({"port": 1}).encode() + b"\n")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert engine.port == 0
    await engine.end()
    assert not errors


@pytest.mark.parametrize(("host", "url"), [("10.0.0.1", "http://10.0.0.1:0/x"), ("fd00::1", "http://[fd00::1]:0/x")])
def test_the_url_of_an_engine(host: str, url: str) -> None:
    assert EngineProcess(VLLM, launch(members=(Member("n", host),)))._url("/x") == url


async def test_the_log_of_a_running_engine_is_kept(tmp_path: Path) -> None:
    path = log_path(tmp_path, "one", 1, "a")
    engine = EngineProcess(Script("import time; time.sleep(600)"), launch(log=path))
    await engine.start()
    for replica in range(2 * KEEP_FILES):
        os.utime(path, (1, 1))
        log_path(tmp_path, "one", 2, str(replica)).touch()
    assert path.exists()
    await engine.end()
    log_path(tmp_path, "one", 2, "last")
    assert not path.exists()


async def test_the_cause_of_a_failure_is_found_in_a_trimmed_log_and_none_in_a_removed_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("of the replica\n" * 1000)
    engine = EngineProcess(Script("raise SystemExit(3)"), launch(log=path))
    await engine.start()
    until(engine.ended, 20, "the engine has exited")
    path.write_text("ValueError: no such dtype\n")
    assert engine.cause() == "ValueError: no such dtype"
    path.unlink()
    assert engine.cause() == "the engine exited with code 3; no cause found in its log"
    await engine.end()


async def test_a_failure_caused_by_the_fork_is_recognized(tmp_path: Path) -> None:
    """A forked engine can fail because it was forked; a plain one cannot, whatever its log says."""
    text = "raise RuntimeError('Cannot re-initialize CUDA in forked subprocess')"
    engine = EngineProcess(Script(text), launch(log=tmp_path / "log"))
    await engine.start()
    with pytest.raises(EngineError, match="in forked subprocess") as plain:
        await engine.ready(20)
    assert not isinstance(plain.value, ForkFailed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineProcess, "forked", True)
        with pytest.raises(ForkFailed, match="in forked subprocess"):
            await engine.ready(20)
    await engine.end()


def test_the_public_interface_is_complete_and_light() -> None:
    for name in api.__all__:
        assert getattr(api, name) is not None
    assert set(api.__all__) >= {"Engine", "Launch", "Shim", "SidecarEngine", "hold", "notify"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = api.nothing
    code = "import sys; from llmrun_runtime.engines.api import hold; hold(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    installed = {name.partition(".")[0] for name in loaded} & {"pydantic", "aiohttp", "llmrun", "ray", "starlette"}
    assert "llmrun_runtime.engines.shim.lease" in loaded and not installed
