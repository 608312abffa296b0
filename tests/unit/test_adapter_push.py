"""`llmrun adapter push` in control, with a fake store and a fake listing."""

from __future__ import annotations

import asyncio
import io
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from llmrun import LoRA
from llmrun.errors import Refused
from llmrun.lora import MAX_CONFIG_BYTES
from llmrun_runtime.control.operations import adapter_push
from llmrun_runtime.control.operations.adapter_push import AdapterPushes
from llmrun_runtime.control.state.models import Models
from llmrun_runtime.control.state.operation import Operations
from tests.support.factories import deployed, spec


class Bench:
    """Pushes through a fake node agent: `copying` are the current targets, `peak` the most copies to one target."""

    def __init__(self, folder: Path, lora: LoRA) -> None:
        self.copying: list[str] = []
        self.peak = 0
        self.listable = True
        self.listed: set[str] = set()
        models = Models()
        models.put(deployed(spec(lora=lora)))
        adapters: Any = SimpleNamespace(refresh=self.refresh, has=lambda model, name: name in self.listed)
        self.pushes = AdapterPushes(folder, models, adapters, Operations())
        self.agent = SimpleNamespace(push_adapter=SimpleNamespace(remote=self.copy))

    async def copy(self, folder: str, target: Any, env: Any) -> None:
        """Record a copy that takes a moment."""
        self.copying.append(str(target))
        self.peak = max(self.peak, self.copying.count(str(target)))
        await asyncio.sleep(0.05)
        self.copying.remove(str(target))
        self.listed.add(str(target).rpartition("/")[2])

    async def refresh(self, model: str) -> bool:
        """Return whether the source could be listed."""
        return self.listable

    async def push(self, name: str, config: bytes = b'{"r": 8}') -> list[str]:
        """Return all events of a push."""
        operation = await self.pushes.start("one", name, packed(config))
        return [f"{event.kind}: {event.text}" async for event in operation.events()]


async def packed(config: bytes) -> AsyncIterator[bytes]:
    """Yield an adapter as the CLI sends it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in (("adapter_config.json", config), ("adapter_model.safetensors", b"weights")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    yield archive.getvalue()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path / "pushes", LoRA("s3://acme/all", max_rank=16))
    monkeypatch.setattr(adapter_push, "agent_on", lambda node: bench.agent)
    context = SimpleNamespace(get_node_id=lambda: "head")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    return bench


async def test_pushes_to_one_target_take_turns_and_leave_no_files(bench: Bench, tmp_path: Path) -> None:
    events = await asyncio.gather(*(bench.push(name) for name in ("legal", "legal", "legal", "sql")))
    assert [lines[-2] for lines in events[:3]] == ["done: pushed one:legal to s3://acme/all/legal"] * 3
    assert bench.peak == 1 and not list((tmp_path / "pushes").iterdir())


async def test_a_copied_adapter_that_is_not_listed_is_an_error(bench: Bench) -> None:
    bench.listable = False
    assert "copied to s3://acme/all/legal, but listing it failed" in (await bench.push("legal"))[-2]
    bench.listable = True
    bench.listed = set()
    bench.agent.push_adapter.remote = lambda *_: asyncio.sleep(0)
    assert "but not listed there" in (await bench.push("legal"))[-2]


@pytest.mark.parametrize(
    ("config", "message"),
    [(b'{"r": 32}', "legal has rank 32"), (b"no", "cannot read"), (b" " * (MAX_CONFIG_BYTES + 1), "bytes")],
)
async def test_an_adapter_that_no_engine_can_load_is_not_copied(
    bench: Bench, tmp_path: Path, config: bytes, message: str
) -> None:
    with pytest.raises(Refused, match=message):
        await bench.push("legal", config)
    assert not list((tmp_path / "pushes").iterdir())


async def test_a_running_operation_is_not_forgotten() -> None:
    operations, hold = Operations(), asyncio.Event()

    async def wait(_: Any) -> None:
        await hold.wait()

    async def finish(_: Any) -> None:
        return None

    first = operations.start("first", wait)
    ended = []
    for _ in range(40):
        ended.append(operations.start("more", finish))
        await asyncio.sleep(0.001)
    assert operations.find(first.id) is first and operations.find(ended[-1].id)
    with pytest.raises(Refused, match=f"operation {ended[0].id} not found"):
        operations.find(ended[0].id)
    hold.set()
    assert [event.kind async for event in first.events()] == ["end"]


def test_a_file_with_holes_is_refused(tmp_path: Path) -> None:
    """Its few bytes in the tar would become any number on the disk."""
    sparse = tmp_path / "adapter_config.json"
    with sparse.open("wb") as file:
        file.truncate(2**30)
    archive = tmp_path / "sparse.tar"
    command = ["tar", "--sparse", "--format=gnu", "-cf", str(archive), "-C", str(tmp_path), sparse.name]
    subprocess.run(command, check=True)
    assert archive.stat().st_size < 2**20
    with pytest.raises(Refused, match="the adapter arrived damaged"):
        adapter_push._unpack(archive, tmp_path / "out")
