"""`llmrun adapter push`, control's side; the store and the listing are stand-ins."""

from __future__ import annotations

import asyncio
import io
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
from llmrun.spec import ModelSpec
from llmrun_runtime.control.operations import adapter_push as pushes_module
from llmrun_runtime.control.operations.adapter_push import AdapterPushes
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.control.state.operation import Operations
from llmrun_runtime.placement import Placement


class Shop:
    """Pushes over a node agent that copies nothing: `copying` says what it does now, `most` how many at once it did."""

    def __init__(self, folder: Path, lora: LoRA) -> None:
        self.copying: list[str] = []
        self.most = 0
        self.listed = True
        self.known: set[str] = set()
        self.jobs = Operations()
        row = Deployed("app", 1, 1, ModelSpec(name="one", model="org/one", lora=lora), Placement(1, 0), proven=True)
        scaling: Any = SimpleNamespace(deployed={"one": row})
        adapters: Any = SimpleNamespace(look=self.look, has=lambda model, name: name in self.known)
        self.pushes = AdapterPushes(folder, scaling, adapters, self.jobs)
        self.agent = SimpleNamespace(push=SimpleNamespace(remote=self.copy))

    async def copy(self, here: str, target: Any, env: Any) -> None:
        """Take a moment."""
        self.copying.append(str(target))
        self.most = max(self.most, self.copying.count(str(target)))
        await asyncio.sleep(0.05)
        self.copying.remove(str(target))
        self.known.add(str(target).rpartition("/")[2])

    async def look(self, model: str) -> bool:
        """Whether it could be listed."""
        return self.listed

    async def push(self, name: str, config: bytes = b'{"r": 8}') -> list[str]:
        """What is heard of it, to the end."""
        job = await self.pushes.start("one", name, packed(config))
        return [f"{event.kind}: {event.text}" async for event in job.events()]


async def packed(config: bytes) -> AsyncIterator[bytes]:
    """An adapter as the command line sends it."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, data in (("adapter_config.json", config), ("adapter_model.safetensors", b"weights")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    yield whole.getvalue()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    made = Shop(tmp_path / "pushes", LoRA("s3://acme/all", max_rank=16))
    monkeypatch.setattr(pushes_module, "agent_on", lambda node: made.agent)
    here = SimpleNamespace(get_node_id=lambda: "head")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    return made


async def test_pushes_to_one_place_take_turns_and_leave_nothing(shop: Shop, tmp_path: Path) -> None:
    heard = await asyncio.gather(*(shop.push(name) for name in ("legal", "legal", "legal", "sql")))
    assert [said[-2] for said in heard[:3]] == ["done: one:legal is s3://acme/all/legal now"] * 3
    assert shop.most == 1 and not list((tmp_path / "pushes").iterdir())


async def test_what_was_copied_and_is_not_listed_is_said(shop: Shop) -> None:
    shop.listed = False
    assert "it was copied to s3://acme/all/legal, which could not be listed" in (await shop.push("legal"))[-2]
    shop.listed = True
    shop.known = set()
    shop.agent.push.remote = lambda *_: asyncio.sleep(0)
    assert "and is not listed there" in (await shop.push("legal"))[-2]


@pytest.mark.parametrize(
    ("config", "said"),
    [(b'{"r": 32}', "its rank is 32"), (b"no", "cannot be read"), (b" " * (MAX_CONFIG_BYTES + 1), "bytes")],
)
async def test_what_no_engine_would_take_is_refused_before_it_is_copied(
    shop: Shop, tmp_path: Path, config: bytes, said: str
) -> None:
    with pytest.raises(Refused, match=said):
        await shop.push("legal", config)
    assert not list((tmp_path / "pushes").iterdir())


async def test_a_job_that_runs_is_not_forgotten() -> None:
    jobs, hold = Operations(), asyncio.Event()

    async def wait(_: Any) -> None:
        await hold.wait()

    async def end(_: Any) -> None:
        return None

    first = jobs.start("first", wait)
    ended = []
    for _ in range(40):
        ended.append(jobs.start("more", end))
        await asyncio.sleep(0.001)
    assert jobs.find(first.id) is first and jobs.find(ended[-1].id)
    with pytest.raises(Refused):
        jobs.find(ended[0].id)
    hold.set()
    assert [event.kind async for event in first.events()] == ["end"]
