"""Nothing starts on a node whose disk is full, and the error names the folder."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmrun.errors import EngineError
from llmrun.settings import Settings
from llmrun_runtime.control import disk_watch
from llmrun_runtime.control.disk_watch import DiskWatch
from llmrun_runtime.node.agent import NoAgent, NodeAgent
from llmrun_runtime.node.disk_space import MIN_FREE_BYTES, Disk, lack_of_space, measure_disks
from llmrun_runtime.placement import Node
from llmrun_runtime.replica.provisioner import Provisioner

Fill = Callable[[Path, int], None]


@pytest.fixture
def fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fill:
    """Set the free bytes that the disk of a folder reports. All others have plenty."""
    free: dict[Path, int] = {}
    monkeypatch.setenv("LLMRUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=free.get(Path(path), 2**40), total=2**40)
    )
    (tmp_path / "home").mkdir()
    return free.__setitem__


def test_a_full_home_or_temp_folder_is_named(fill: Fill, tmp_path: Path) -> None:
    home, temp = tmp_path / "home", Path(tempfile.gettempdir())
    fill(home, MIN_FREE_BYTES)
    assert lack_of_space(Settings()) == ""
    fill(temp, 0)
    assert lack_of_space(Settings()) == f"{temp} has only 0 MiB free. Free space, then try again"
    fill(home, MIN_FREE_BYTES - 1)
    assert lack_of_space(Settings()) == f"{home} has only 15 MiB free. Free space, then try again"


def test_a_home_that_does_not_exist_yet_is_on_the_disk_of_its_parent(fill: Fill, tmp_path: Path) -> None:
    (tmp_path / "home").rmdir()
    fill(tmp_path, 0)
    assert lack_of_space(Settings()).startswith(f"{tmp_path / 'home'} has only 0 MiB free")


async def test_a_start_and_a_preparation_fail_at_once_on_a_full_disk(fill: Fill, tmp_path: Path) -> None:
    fill(tmp_path / "home", 0)
    provisioner = Provisioner.__new__(Provisioner)  # its constructor needs a cluster
    provisioner.host = "10.0.0.2"
    with pytest.raises(EngineError, match=r"^node 10\.0\.0\.2 .*: .*/home has only 0 MiB free\. Free space"):
        await provisioner.launch(())
    with pytest.raises(EngineError, match=r"/home has only 0 MiB free"):
        await NodeAgent.install(NodeAgent.__new__(NodeAgent), SimpleNamespace(code=None, requirements=()))  # type: ignore[arg-type]


def test_each_file_system_is_measured_once(fill: Fill, tmp_path: Path) -> None:
    fill(tmp_path / "home", 5)
    disks = measure_disks(Settings())
    assert disks[0] == Disk(str(tmp_path / "home"), 5, 2**40)
    assert len(disks) == len({Path(folder).stat().st_dev for folder in (tmp_path, tempfile.gettempdir())})


async def test_low_disks_are_warnings_and_silent_nodes_hide_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reply:
        def __init__(self, disks: list[Disk] | None) -> None:
            self.disks, self._disks = self, disks

        async def remote(self) -> list[Disk]:
            if self._disks is None:
                await asyncio.sleep(60)
            return self._disks or []

    disks = [Disk("/home", 3 * 2**28, 2**36), Disk("/tmp", 2**30, 2**34), Disk("/big", 2**34, 2**40)]

    def agent_of(node_id: str) -> Reply:
        if node_id == "none":
            raise NoAgent("no agent runs")
        return Reply(disks if node_id == "low" else None)

    monkeypatch.setattr(disk_watch, "agent_of", agent_of)
    monkeypatch.setattr(disk_watch, "AGENT_TIMEOUT_S", 0.2)
    watch = DiskWatch()
    await watch._measure([Node(name, f"host-{name}", {}, {}) for name in ("none", "hangs", "low")])
    assert watch.warnings() == (
        "node host-low: /home has 0.8 GiB free (1%)",
        "node host-low: /big has 16.0 GiB free (2%)",
    )
    (family,) = watch.collect()
    assert [(s.labels["path"], s.value) for s in family.samples] == [(disk.path, disk.free) for disk in disks]
