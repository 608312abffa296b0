"""The log files of a node: read in parts, trimmed while an engine writes to them, removed once it has exited."""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import subprocess
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrun_runtime import logs
from llmrun_runtime.logs import (
    KEEP_DELETED_S,
    KEEP_FILES,
    CompressedLog,
    log_path,
    mark_in_use,
    read_compressed,
    read_logs,
    remove_logs,
    trim_logs,
)
from llmrun_runtime.node import agent
from llmrun_runtime.node.agent import NodeAgent
from tests.support.cluster import until

NAME = "v1-a.log"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of the logs of model `one`, in the home `tmp_path`."""
    path = tmp_path / "logs" / "models" / "one"
    path.mkdir(parents=True)
    return path


def make_old_logs(folder: Path) -> None:
    """Create KEEP_FILES logs that are newer than the others."""
    for number in range(KEEP_FILES):
        (folder / f"v2-{number}.log").write_text("x\n")


def test_a_large_log_is_read_in_parts(tmp_path: Path, folder: Path) -> None:
    size = 2**27
    with (folder / NAME).open("wb") as file:
        file.truncate(size)  # sparse
        file.seek(0, os.SEEK_END)
        file.write(b"\na\nb\n")
    tracemalloc.start()
    assert read_logs(tmp_path, "one", {}, 2) == {NAME: (size + 5, "a\nb\n")}
    assert read_logs(tmp_path, "one", {}, 0) == {NAME: (size + 5, "")}
    assert read_logs(tmp_path, "one", {NAME: size + 3}, 0) == {NAME: (size + 5, "b\n")}
    assert read_logs(tmp_path, "one", {NAME: 0}, 0)[NAME][0] == logs.READ_BYTES
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * logs.READ_BYTES


async def test_the_node_agent_reads_logs_in_a_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()

    def wait_for_the_loop(*_: Any) -> dict[str, tuple[int, str]]:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(5)
        return {}

    monkeypatch.setattr(agent, "read_logs", wait_for_the_loop)
    node: Any = SimpleNamespace(_root=tmp_path)
    assert await NodeAgent.logs(node, "one", {}, 0) == {}


def test_the_log_of_a_running_process_is_kept(tmp_path: Path, folder: Path) -> None:
    log = folder / NAME
    with log.open("ab") as file:
        mark_in_use(file)
        process = subprocess.Popen(["sleep", "60"], stdout=file)
    os.utime(log, (1, 1))
    make_old_logs(folder)
    try:
        log_path(tmp_path, "one", 3, "b")
        assert log.exists() and len(list(folder.iterdir())) == KEEP_FILES
    finally:
        process.kill()
        process.wait()
    os.utime(log, (1, 1))
    make_old_logs(folder)
    log_path(tmp_path, "one", 3, "b")
    assert not log.exists()


def test_a_log_that_another_process_removes_meanwhile_is_skipped(tmp_path: Path, folder: Path) -> None:
    (folder / "v1-gone.log").symlink_to(folder / "removed")  # listed, and cannot be read
    (folder / NAME).write_text("a\n")
    assert log_path(tmp_path, "one", 3, "b") == folder / "v3-b.log"
    assert read_logs(tmp_path, "one", {}, 1) == {NAME: (2, "a\n")}


def test_a_large_log_is_trimmed_while_its_engine_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 1000)
    monkeypatch.setattr(logs, "KEEP_BYTES", 100)
    (folder / "v1-small.log").write_text("small\n")
    with (folder / NAME).open("ab", buffering=0) as engine:
        engine.write(b"".join(b"%9d\n" % number for number in range(200)))
        offset = read_logs(tmp_path, "one", {}, 0)[NAME][0]
        trim_logs(tmp_path)
        engine.write(b"next\n")
    lines = (folder / NAME).read_text().split("\n")
    assert lines[0] == "[llmrun] the log was too large: older lines were removed"
    assert [line.strip() for line in lines[1:]] == [*map(str, range(190, 200)), "next", ""]
    end, text = read_logs(tmp_path, "one", {NAME: offset}, 0)[NAME]
    assert text == (folder / NAME).read_text() and end == len(text), "a reader beyond the end starts again"
    assert (folder / "v1-small.log").read_text() == "small\n"


def test_logs_of_deleted_models_are_removed_after_a_week(tmp_path: Path, folder: Path) -> None:
    log, other = folder / NAME, folder.parent / "org" / "other" / NAME
    other.parent.mkdir(parents=True)
    for path in (log, other):
        path.write_text("a\n")
    soon, later = time.time() + KEEP_DELETED_S - 60, time.time() + KEEP_DELETED_S + 60
    remove_logs(tmp_path, {"org/other"}, soon)
    assert log.exists()
    with log.open("ab") as file:
        mark_in_use(file)
        remove_logs(tmp_path, {"org/other"}, later)
        assert log.exists(), "an engine writes to it"
    remove_logs(tmp_path, {"org/other"}, later)
    assert not folder.exists() and other.exists()


def rotated(folder: Path) -> list[Path]:
    """Return the rotated files of `ingress.log` once all are compressed."""
    paths: list[Path] = []

    def compressed() -> bool:
        paths[:] = sorted(folder.glob("ingress.log-*"))
        return all(path.suffix == ".gz" for path in paths) and not list(folder.glob(".*.partial"))

    until(compressed, 10, "compressed logs")
    return paths


def test_a_full_log_is_compressed_and_bounded(tmp_path: Path) -> None:
    left = tmp_path / "ingress.log-20200101T000000.000000000"  # an earlier process was killed while it compressed
    left.write_text("old\n")
    handler = CompressedLog(tmp_path / "ingress.log", 3000, 1000)
    (compressed,) = rotated(tmp_path)
    assert gzip.decompress(compressed.read_bytes()) == b"old\n"
    for number in range(2000):
        handler.emit(logging.LogRecord("llmrun", logging.INFO, "", 0, f"request {number}", (), None))
        if number == 299:  # 3600 bytes
            assert list(read_compressed(tmp_path / "ingress.log"))[-300:] == [f"request {n}\n" for n in range(300)]
    until(lambda: sum(path.stat().st_size for path in rotated(tmp_path)) <= 1000, 10, "1000 bytes of logs")
    handler.close()
    assert not compressed.exists() and (tmp_path / "ingress.log").read_text().endswith("request 1999\n")


def test_a_log_that_is_being_compressed_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "audit.log"
    assert list(read_compressed(path)) == []
    for name, text in ("1.gz", "first\n"), ("2.gz", "second\n"), ("4.gz", "fourth\n"):
        tmp_path.joinpath(f"audit.log-{name}").write_bytes(gzip.compress(text.encode()))
    tmp_path.joinpath("audit.log-2").write_text("second\n")  # its copy is complete, it is not removed yet
    tmp_path.joinpath("audit.log-3").write_text("third\n")
    path.write_text("last\n")
    lines = read_compressed(path)
    assert next(lines) == "first\n"
    tmp_path.joinpath("audit.log-3").unlink()  # compressed after the files were listed
    tmp_path.joinpath("audit.log-3.gz").write_bytes(gzip.compress(b"third\n"))
    assert list(lines) == ["second\n", "third\n", "fourth\n", "last\n"]
    tmp_path.joinpath("audit.log-4.gz").write_bytes(gzip.compress(b"fourth\n")[:-4])
    assert list(read_compressed(path))[-1] == "last\n" and "cannot read" in caplog.text
