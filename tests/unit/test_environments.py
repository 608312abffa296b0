"""Code packages and requirements on a node: installed once, held by replicas, removed when no version uses them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrun.errors import EngineError
from llmrun.spec import Secret
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.logs import KEEP_DELETED_S, model_logs
from llmrun_runtime.node.agent import NodeAgent
from llmrun_runtime.node.environments import KEEP_UNUSED_S, Environments
from llmrun_runtime.node.variables import engine_env, worker_env
from llmrun_runtime.wire.reports import UsedOnNodes
from tests.support import factories


def package() -> bytes:
    """Return the zip of a package with one file."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("app.py", "X = 1\n")
    return data.getvalue()


DATA = package()
DIGEST = hashlib.sha256(DATA).hexdigest()


async def fetch(digest: str) -> bytes:
    """Return the package."""
    return DATA


def later() -> float:
    """Return the time at which what is not used now may be removed."""
    return time.time() + KEEP_UNUSED_S + 1


async def test_code_that_no_version_uses_is_removed_after_a_day(tmp_path: Path) -> None:
    environments = Environments(tmp_path, fetch, hold=False)
    folder = await environments.install_code(DIGEST)
    remains = tmp_path / "environments" / ".new-interrupted"
    remains.mkdir(parents=True)
    assert await environments.remove_unused([], [], time.time()) == []
    assert await environments.remove_unused([DIGEST], [], later()) == [remains]
    assert (folder / "app.py").exists()
    os.utime(folder, (1, 1))
    assert await environments.install_code(DIGEST) == folder
    assert await environments.remove_unused([], [], time.time()) == [], "it was used now"
    assert await environments.remove_unused([], [], later()) == [folder]
    assert list((tmp_path / "packages").iterdir()) == []
    assert (await environments.install_code(DIGEST) / "app.py").exists()


async def test_requirements_of_a_version_are_kept(tmp_path: Path) -> None:
    environments = Environments(tmp_path, fetch, hold=False)
    folder = await environments.install_requirements(["pydantic"])  # installed, so nothing is downloaded
    assert await environments.remove_unused([], [["pydantic"]], later()) == []
    assert await environments.remove_unused([], [], later()) == [folder]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line per call of a program in uv's place: its arguments and environment."""
    program, log = tmp_path / "uv", tmp_path / "calls"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"with open({str(log)!r}, 'a') as log:\n"
        "    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=log)\n"
        "print(' + thing==1.0' if '--dry-run' in sys.argv else '')\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr("uv.find_uv_bin", lambda: str(program))
    return log


NODE_SECRETS = (
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_PROFILE",
    "TEAM_TOKEN",
    "DATABASE_URL",
    "VLLM_API_KEY",
    "PGPASSWORD",
)
PASSED = (
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "NCCL_DEBUG",
    "VLLM_LOGGING_LEVEL",
    "HF_HOME",
    "https_proxy",
    "LC_ALL",
)
SECRETS = ("LLMRUN_ADMIN_KEY", "LLMRUN_DATABASE_URL", "LLMRUN_API_KEY", "RAY_AUTH_TOKEN", "llmrun_admin_key")


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets of llmrun and Ray in the environment, and variables that are none."""
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    for name in ("UV_INDEX", "LLMRUN_WEIGHTS_DIR"):
        monkeypatch.setenv(name, "/plain")


@pytest.mark.usefixtures("secrets")
async def test_installations_get_no_secrets_and_no_options(tmp_path: Path, calls: Path) -> None:
    option = "--index-url=http://127.0.0.1:9"
    await Environments(tmp_path, fetch, hold=False).install_requirements([option])
    lines = [json.loads(line) for line in calls.read_text().splitlines()]
    assert [arguments[arguments.index("--") :] for arguments, _ in lines] == [["--", option], ["--", "thing==1.0"]]
    for _, env in lines:
        assert not [key for key in env if key.upper().startswith(("LLMRUN_", "RAY_"))]
        assert env["UV_INDEX"] == "/plain" and env["PATH"] == os.environ["PATH"]


@pytest.mark.usefixtures("secrets")
def test_engines_and_weights_workers_get_no_secrets_of_the_cluster() -> None:
    for env in (engine_env({}, "a node"), worker_env({}, "a node")):
        assert not set(SECRETS) & set(env) and "secret" not in env.values()
    assert "LLMRUN_WEIGHTS_DIR" not in engine_env({}, "a node")
    assert worker_env({"A": "b"}, "a node").items() >= {"LLMRUN_WEIGHTS_DIR": "/plain", "A": "b"}.items()


def test_engines_get_a_nodes_secrets_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NODE_SECRETS, *PASSED):
        monkeypatch.setenv(name, "x")
    env = engine_env({"TOKEN": Secret("HF_TOKEN")}, "a node")
    assert not set(NODE_SECRETS) & set(env) and set(PASSED) <= set(env) and env["TOKEN"] == "x"
    assert set(NODE_SECRETS) <= set(worker_env({}, "a node"))  # a store's own credentials
    monkeypatch.setenv("LLMRUN_ENGINE_ENV", "TEAM_*, HF_TOKEN,LLMRUN_*,")
    env = engine_env({}, "a node")
    assert {"TEAM_TOKEN", "HF_TOKEN"} <= set(env) and not {"AWS_PROFILE", "LLMRUN_ENGINE_ENV"} & set(env)
    with pytest.raises(EngineError, match="the secret NOWHERE is not set on a node"):
        engine_env({"A": Secret("NOWHERE")}, "a node")


async def test_code_that_a_running_replica_uses_is_kept(tmp_path: Path) -> None:
    environments = Environments(tmp_path, fetch, hold=False)
    folder = await environments.install_code(DIGEST)
    script = (
        "import asyncio, sys, pathlib\n"
        "from llmrun_runtime.node.environments import Environments\n"
        f"asyncio.run(Environments(pathlib.Path({str(tmp_path)!r}), None).install_code({DIGEST!r}))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    replica = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert replica.stdin and replica.stdout
    try:
        assert await replica.stdout.readline() == b"ready\n"
        assert await environments.remove_unused([], [], later()) == []
    finally:
        replica.stdin.close()
        await asyncio.wait_for(replica.wait(), 10)
    assert await environments.remove_unused([], [], later()) == [folder]


async def test_a_damaged_package_is_not_installed(tmp_path: Path) -> None:
    environments = Environments(tmp_path, fetch)
    with pytest.raises(EngineError, match="code package 000000000000 is damaged"):
        await environments.install_code("0" * 64)
    assert list((tmp_path / "packages").iterdir()) == []


async def test_a_package_that_would_fill_the_disk_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrun_runtime.node.environments.MAX_UNPACKED_BYTES", 5)
    with pytest.raises(EngineError, match=r"more than .* GiB: leave files out with .llmrunignore"):
        await Environments(tmp_path, fetch).install_code(DIGEST)
    assert list((tmp_path / "packages").iterdir()) == []


async def test_a_node_asks_control_what_is_used(tmp_path: Path) -> None:
    async def call(method: str, *, timeout: float) -> UsedOnNodes:
        assert method == "used_on_nodes" and timeout
        return UsedOnNodes(frozenset({"one"}), frozenset({DIGEST}), frozenset())

    environments = Environments(tmp_path, fetch, hold=False)
    folder = await environments.install_code(DIGEST)
    unused = await environments.install_requirements(["pydantic"])
    logs = [model_logs(tmp_path) / model / "v1-a.log" for model in ("one", "gone")]
    for log in logs:
        log.parent.mkdir(parents=True)
        log.touch()
    control = SimpleNamespace(call=call)
    node: Any = SimpleNamespace(_root=tmp_path, _control=control, _environments=environments)
    await NodeAgent.remove_unused(node, later() + KEEP_DELETED_S)
    assert [path.exists() for path in (folder, unused, *logs)] == [True, False, True, False]


def test_control_knows_what_stored_versions_use(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    spec = factories.spec("one", requirements=["pydantic"])
    code = {"package": DIGEST, "file": "app.py", "cls": "A"}
    spec = type(spec).model_validate(json.loads(spec.model_dump_json()) | {"code": code})
    database.put_version(factories.deployed(spec), active=False)
    used = database.used_on_nodes()
    assert used == UsedOnNodes(frozenset({"one"}), frozenset({DIGEST}), frozenset({("pydantic",)}))
    database.remove(["one"])
    assert not database.used_on_nodes().packages
    database.close()
