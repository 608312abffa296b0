"""Control's actor: what fails for a while does not end it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray
from sqlalchemy.exc import OperationalError

from llmrun.errors import ClusterError
from llmrun_runtime import supervise
from llmrun_runtime.cluster import bootstrap
from llmrun_runtime.control import actor as actor_module
from llmrun_runtime.control.control_plane import ControlPlane
from tests.support.factories import make_control


async def test_control_that_restarts_while_its_database_is_away_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []

    async def load(plane: ControlPlane) -> None:
        loads.append(1)
        if len(loads) == 1:
            raise ClusterError("cannot open the database: it is locked")

    async def serve(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(ControlPlane, "load", load)
    monkeypatch.setattr("llmrun_runtime.http.serve", serve)
    monkeypatch.setattr(actor_module, "RELOAD_S", 0.05)
    monkeypatch.setattr(actor_module, "keep_ingresses", serve)
    control = await make_control(tmp_path)
    try:
        for _ in range(3):  # not one load for each of 500 replicas' calls
            with pytest.raises(ClusterError, match="it is locked"):
                await control.start()
        assert len(loads) == 1
        await asyncio.sleep(0.06)
        await control.start()
        assert len(loads) == 2
    finally:
        for task in control._running:
            task.cancel()
        await asyncio.gather(*control._running, return_exceptions=True)
        control._socket.close()
        control._plane.database.close()


async def test_an_error_of_the_database_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def load(plane: ControlPlane) -> None:
        raise OperationalError("SELECT models.new", {}, Exception("no such column: models.new"))

    monkeypatch.setattr(ControlPlane, "load", load)
    control = await make_control(tmp_path)
    with pytest.raises(ClusterError) as caught:
        await control.start()
    control._socket.close()
    text = str(caught.value)
    assert "cannot use its database" in text and "no such column: models.new" in text and "\n" not in text


def test_an_unexpected_error_of_a_start_is_one_line_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*_: Any, **__: Any) -> None:
        raise ray.exceptions.RayTaskError("start", "\x1b[36mray::Control.start\x1b[39m", KeyError("port\nmore"))

    monkeypatch.setattr("ray.get", get)
    with pytest.raises(ClusterError) as caught:
        bootstrap._get(None)
    assert str(caught.value).startswith("llmrun failed to start: KeyError: ") and "\x1b" not in str(caught.value)


async def test_a_task_that_raises_is_counted_and_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RETRY_S", 0.01)
    runs: list[int] = []

    async def work() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise AttributeError("a message of another release")

    errors: list[str] = []
    await asyncio.wait_for(supervise.supervise("watch", work, errors.append), 5)
    assert len(runs) == 3 and errors == ["watch", "watch"]
