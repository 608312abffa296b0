"""The launches of an engine's members, for a model with adapters on two nodes."""

from __future__ import annotations

from pathlib import Path

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
    return [
        make_launch(
            config,
            MEMBERS,
            tmp_path,
            "node a",
            code=None,
            site=None,
            forkserver=None,
            log=tmp_path / "log",
            member_rank=member_rank,
            port=7,
        )
        for member_rank in (0, 1)
    ]


def test_the_lora_rank_does_not_change_the_member_rank(launches: list[Launch]) -> None:
    assert [launch.member_rank for launch in launches] == [0, 1]
    assert [launch.shim.max_lora_rank for launch in launches] == [32, 32]


def test_only_member_0_of_an_engine_with_adapters_serves_http(launches: list[Launch]) -> None:
    first, second = (" ".join(get_engine("vllm").command(launch)) for launch in launches)
    assert "--nnodes 2 --node-rank 0" in first and "--headless" not in first
    assert "--nnodes 2 --node-rank 1" in second and "--headless" in second
