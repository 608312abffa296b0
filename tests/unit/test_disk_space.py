"""Nothing starts on a node whose disk is full, and the error names the folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmrun.errors import EngineError
from llmrun.settings import Settings
from llmrun_runtime.node.agent import NodeAgent
from llmrun_runtime.node.disk_space import MIN_FREE_BYTES, lack_of_space
from llmrun_runtime.replica.provisioner import Provisioner

Fill = Callable[[Path, int], None]


@pytest.fixture
def fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fill:
    """Set the free bytes that the disk of a folder reports. All others have plenty."""
    free: dict[Path, int] = {}
    monkeypatch.setenv("LLMRUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free.get(Path(path), 2**40)))
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
