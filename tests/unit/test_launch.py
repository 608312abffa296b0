"""The launches of engines, and of the members of one on two nodes, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrun import LoRA
from llmrun_runtime.engines.base import Launch, Member
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.node.launch import make_launch
from llmrun_runtime.wire.replica_config import ReplicaConfig
from tests.support.factories import spec

MEMBERS = (Member("a", "10.0.0.1", ("0",)), Member("b", "10.0.0.2", ("0",)))


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Return the launches of both members."""
    monkeypatch.setenv("LLMRUN_HOME", str(tmp_path))
    two_nodes = spec(model=str(tmp_path), gpus=2, nodes=2, lora=LoRA("s3://acme/loras", max_rank=32))
    config = ReplicaConfig(spec=two_nodes, version=1, pin=None, start_timeout=1, drain_timeout=1, hook_timeout=1)
    return [make(config, MEMBERS, tmp_path, member_rank=member_rank, port=7) for member_rank in (0, 1)]


def make(config: ReplicaConfig, members: tuple[Member, ...], folder: Path, **more: Any) -> Launch:
    """Return a launch without hooks and requirements."""
    log = folder / "log"
    return make_launch(config, members, folder, "node a", code=None, site=None, forkserver=None, log=log, **more)


@pytest.mark.parametrize(
    ("options", "devices", "expected"),
    [
        ({}, (), True),
        ({"cpus": 2}, (), True),
        ({}, ("0",), False),
        ({"engine_args": {"tensor_parallel_size": 2}}, (), False),  # vLLM chooses the cores of each worker
    ],
)
def test_an_engine_with_one_worker_and_no_device_gets_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    devices: tuple[str, ...],
    expected: bool,
) -> None:
    monkeypatch.setenv("LLMRUN_HOME", str(tmp_path))
    one = spec(model=str(tmp_path), **options)
    config = ReplicaConfig(spec=one, version=1, pin=None, start_timeout=1, drain_timeout=1, hook_timeout=1)
    launch = make(config, (Member("a", "127.0.0.1", devices),), tmp_path)
    assert (launch.gets_cores, launch.cpus) == (expected, options.get("cpus"))


def test_members_on_several_nodes_get_no_cores(launches: list[Launch]) -> None:
    assert not any(launch.gets_cores for launch in launches)


def test_the_lora_rank_does_not_change_the_member_rank(launches: list[Launch]) -> None:
    assert [launch.member_rank for launch in launches] == [0, 1]
    assert [launch.shim.max_lora_rank for launch in launches] == [32, 32]


def test_only_member_0_of_an_engine_with_adapters_serves_http(launches: list[Launch]) -> None:
    first, second = (" ".join(get_engine("vllm").command(launch)) for launch in launches)
    assert "--nnodes 2 --node-rank 0" in first and "--headless" not in first
    assert "--nnodes 2 --node-rank 1" in second and "--headless" in second
