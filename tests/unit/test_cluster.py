"""The parts of a local cluster that need no Ray: restarts, names, and missing ingresses."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from llmrun.errors import ClusterError
from llmrun.settings import Settings
from llmrun_cli.client import unreachable
from llmrun_runtime import actors, http
from llmrun_runtime.actors import ControlClient, NoControl, ingress_generation, ingress_names, older_ingresses
from llmrun_runtime.cluster import local
from llmrun_runtime.cluster.local import free_ports, ray_failure
from llmrun_runtime.cluster.restarts import PAUSES_S, WINDOW_S, RestartPolicy
from llmrun_runtime.control.ingresses import MISSING_S, MissingIngresses
from llmrun_runtime.ingress.handover import receive_sockets, send_sockets


def test_a_cluster_starts_again_three_times_in_ten_minutes() -> None:
    policy = RestartPolicy()
    assert [policy.pause(now) for now in (0, 10, 20)] == list(PAUSES_S)
    assert policy.pause(30) is None
    assert policy.pause(30 + WINDOW_S) == PAUSES_S[0]


def test_the_cause_is_the_process_that_ended(tmp_path: Path) -> None:
    log = tmp_path / "ray.log"
    assert "see " in ray_failure(log)
    log.write_text("Some Ray subprocesses exited unexpectedly:\n\x1b[31m\x1b[1mraylet\x1b[22m [exit code=-9]\x1b[0m\n")
    assert ray_failure(log) == "a process of Ray exited: raylet [exit code=-9]"


def test_an_unreachable_cluster_says_why_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRUN_HOME", str(tmp_path))
    monkeypatch.setenv("LLMRUN_URL", "http://127.0.0.1:1")
    assert "cannot reach llmrun" in str(unreachable("http://127.0.0.1:1", OSError("refused")))
    Settings().stopped_file.write_text(json.dumps({"at": 0, "cause": "raylet [exit code=-9]"}))
    text = str(unreachable("http://127.0.0.1:1", OSError("refused")))
    assert "the cluster stopped at 19" in text and "raylet [exit code=-9]. See " in text and "`llmrun up`" in text


def test_generations_of_ingresses_have_different_names() -> None:
    assert ingress_names(2) == ["ingress", "ingress-2"]
    assert ingress_names(2, 3) == ["ingress-r3", "ingress-2-r3"]
    names = [*ingress_names(2), *ingress_names(2, 3), "control", "node-abc"]
    assert [ingress_generation(name) for name in names] == [0, 0, 3, 3, None, None]
    assert older_ingresses(names, 3) == ["ingress", "ingress-2"] and older_ingresses(names, 0) == []


def test_an_ingress_is_created_when_it_has_been_missing_for_a_while() -> None:
    missing = MissingIngresses(["ingress", "ingress-2"])
    assert missing.update(["control"], 0) == []
    assert missing.update(["control", "ingress"], MISSING_S) == ["ingress-2"]
    assert missing.update(["ingress-2"], MISSING_S + 1) == []


async def test_listening_sockets_reach_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "handover" / "a.sock"
    listener = http.bind("127.0.0.1", 0, shared=True)

    async def request() -> None:
        await asyncio.to_thread(send_sockets, path, [listener])

    (received,) = await receive_sockets(path, request)
    assert received.getsockname() == listener.getsockname() and not path.exists()
    listener.close()
    with socket.create_connection(received.getsockname(), timeout=5), received.accept()[0]:
        received.close()


def actor(reply: Any) -> Any:
    """A handle to an actor whose method `report` replies, or raises if `reply` is an exception."""

    async def remote() -> Any:
        if isinstance(reply, Exception):
            raise reply
        return reply

    return SimpleNamespace(report=SimpleNamespace(remote=remote))


async def test_calls_reach_a_control_that_replaces_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "RETRY_S", 0.01)
    handles = iter([actor(ray.exceptions.ActorDiedError()), ValueError("no actor"), actor("new")])

    def control_handle() -> Any:
        handle = next(handles)
        if isinstance(handle, ValueError):
            raise handle
        return handle

    monkeypatch.setattr(actors, "control_handle", control_handle)
    assert await ControlClient().call("report", timeout=5) == "new"


async def test_a_call_fails_when_there_has_been_no_control_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "RETRY_S", 0.01)
    monkeypatch.setattr(actors, "MISSING_S", 0.05)

    def control_handle() -> Any:
        raise ValueError("no actor")

    monkeypatch.setattr(actors, "control_handle", control_handle)
    with pytest.raises(NoControl):
        await ControlClient().call("report", timeout=5)


def test_ports_for_ray_are_not_those_that_the_kernel_gives_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = int(local.EPHEMERAL_PORTS.read_text().split()[0])
    ports = free_ports("127.0.0.1", 3)
    assert len(set(ports)) == 3 and all(local.LOWEST_PORT <= port < first for port in ports)
    monkeypatch.setattr(local, "LOWEST_PORT", first - 4)
    with socket.create_server(("127.0.0.1", first - 2)):
        assert set(free_ports("127.0.0.1", 3)) == {first - 4, first - 3, first - 1}
    (tmp_path / "range").write_text("1024\t65535\n")  # the kernel gives all of them away
    monkeypatch.setattr(local, "EPHEMERAL_PORTS", tmp_path / "range")
    assert len(set(free_ports("127.0.0.1", 3))) == 3
    with pytest.raises(ClusterError, match=r"no free port on 192\.0\.2\.1"):
        free_ports("192.0.2.1", 1)


def test_ray_without_a_token_is_refused_beyond_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for mode in ("token", ""):
        monkeypatch.setenv("RAY_AUTH_MODE", mode) if mode else monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        local._check_ray_auth("10.0.0.5")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    local._check_ray_auth("127.0.0.1")
    with pytest.raises(ClusterError, match=r"RAY_AUTH_MODE=disabled with --node-ip 10\.0\.0\.5: every machine"):
        local._check_ray_auth("10.0.0.5")
    assert local._environment(Settings(home=tmp_path), "127.0.0.1:1")["RAY_enable_metrics_collection"] == "0"


def test_a_folder_of_another_user_is_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "llmrun-x"
    path.mkdir()
    (path / "old").touch()
    assert local._new_temp(path) == path and list(path.iterdir()) == []
    monkeypatch.setattr("llmrun_runtime.cluster.local.shutil.rmtree", lambda *args, **kwargs: None)  # not allowed
    other = local._new_temp(path)
    assert other != path and other.stat().st_mode & 0o777 == 0o700 and other.name.startswith("llmrun-x-")
