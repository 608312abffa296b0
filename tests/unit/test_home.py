"""The home and what processes write are for one user alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun.errors import ClusterError
from llmrun.settings import Settings


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_created_is_for_one_user(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "more" / "home")
    settings.make_home()
    (settings.root / "logs").mkdir()
    (settings.root / "logs" / "control.log").write_text("")
    assert (mode(settings.root), mode(settings.root / "logs")) == (0o700, 0o700)
    assert mode(settings.root / "logs" / "control.log") == mode(settings.admin_key_file) == 0o600


@pytest.mark.parametrize("entry", ["", "admin.key", "ray.token", "cluster.json", "llmrun.db", "logs"])
def test_a_home_that_others_can_enter_is_closed(tmp_path: Path, entry: str) -> None:
    tmp_path.chmod(0o755)
    if entry:
        (tmp_path / entry).write_text("")
    Settings(home=tmp_path).open_home()
    assert mode(tmp_path) == 0o700


def test_a_directory_that_others_may_need_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("")
    tmp_path.chmod(0o775)
    with pytest.raises(ClusterError, match=rf"other users can enter LLMRUN_HOME {tmp_path} \(mode 0775\).*`chmod 700"):
        Settings(home=tmp_path).open_home()
    assert mode(tmp_path) == 0o775
    tmp_path.chmod(0o700)
    Settings(home=tmp_path).open_home()


def test_a_home_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ClusterError, match=r"cannot open LLMRUN_HOME .*: .*Set LLMRUN_HOME to a directory of this user"
    ):
        Settings(home=tmp_path / "file" / "home").open_home()
