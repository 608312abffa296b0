"""The cores that engines on CPU compute on."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmrun_runtime.engines.process import cores as module
from llmrun_runtime.engines.process.cores import Claim, Core, choose, claim_cores, list_cores, quota, read_claims
from llmrun_runtime.engines.process.temp_dir import TempDir, sweep_temp_dirs

TWO = [Core(0, (0,)), Core(1, (1,))]
EIGHT = [Core(cpu, (cpu,)) for cpu in range(8)]
SMT = [Core(cpu, (cpu, cpu + 8)) for cpu in range(8)]
NUMA = [Core(cpu, (cpu,), cpu // 4) for cpu in range(8)]
MANY = 1000


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path


@pytest.mark.parametrize(
    ("cores", "claims", "cpus", "limit", "expected"),
    [
        # Alone: all but the last core, as vLLM does.
        (TWO, [], None, MANY, [0]),
        (EIGHT, [], None, MANY, [0, 1, 2, 3, 4, 5, 6]),
        ([Core(5, (5,))], [], None, MANY, [5]),
        # With cpus=: as many. The last core is left to the rest.
        (EIGHT, [], 3, MANY, [0, 1, 2]),
        (EIGHT, [], 8, MANY, [0, 1, 2, 3, 4, 5, 6]),
        (TWO, [], 0.5, MANY, [0]),
        (EIGHT, [], 1.5, MANY, [0, 1]),
        # One thread for each physical core.
        (SMT, [], 4, MANY, [0, 1]),
        (SMT, [], 3, MANY, [0, 1]),
        (SMT, [], None, MANY, [0, 1, 2, 3, 4, 5, 6]),
        # Other cores than the neighbours', while there are any: the last one, too.
        (EIGHT, [Claim((0, 1, 2), 3)], 3, MANY, [3, 4, 5]),
        (EIGHT, [Claim((0, 1, 2), 3)], None, MANY, [3, 4, 5, 6]),
        (TWO, [Claim((0,), 1)], 1, MANY, [1]),
        (TWO, [Claim((0,), None)], None, MANY, [1]),
        (TWO, [Claim((0,), 0.5)], 0.5, MANY, [1]),
        # None is left: the least used.
        (TWO, [Claim((0,), 1), Claim((1,), 0.5)], 0.5, MANY, [1]),
        (TWO, [Claim((0,), 1), Claim((1,), 1)], None, MANY, [0]),
        # An engine without cpus= does not keep its cores from one that reserves some.
        (EIGHT, [Claim((0, 1, 2, 3, 4, 5, 6), None)], 2, MANY, [0, 7]),
        # One NUMA node, the emptier one.
        (NUMA, [], None, MANY, [0, 1, 2, 3]),
        (NUMA, [Claim((0, 1), 2)], 2, MANY, [2, 3]),
        (NUMA, [Claim((0, 1, 2), 3)], 2, MANY, [4, 5]),
        (NUMA, [], 6, MANY, [0, 1, 2, 3]),
        # A container's quota.
        (EIGHT, [], None, 3, [0, 1, 2]),
        (EIGHT, [], 6, 3, [0, 1, 2]),
        ([], [], None, MANY, []),
    ],
)
def test_the_cores_of_an_engine(
    cores: list[Core], claims: list[Claim], cpus: float | None, limit: int, expected: list[int]
) -> None:
    assert [core.cpu for core in choose(cores, claims, cpus, limit)] == expected


def test_engines_that_start_at_the_same_time_get_different_cores(temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "list_cores", lambda: EIGHT)
    monkeypatch.setattr(module, "quota", lambda: MANY)
    folders = [TempDir.make() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        chosen = list(threads.map(lambda folder: claim_cores(folder, 2), folders))
    assert sorted(cpu for cores in chosen for cpu in cores) == list(range(8))
    for folder in folders:
        folder.remove()
    assert list(read_claims(temp)) == []


def test_a_claim_ends_with_a_replica_that_was_killed(temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "list_cores", lambda: TWO)
    code = f"""
import os, sys, tempfile
tempfile.tempdir = {str(temp)!r}
from llmrun_runtime.engines.process.cores import claim_cores
from llmrun_runtime.engines.process.temp_dir import TempDir
claim_cores(TempDir.make(), 1)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert [claim.cpus for claim in read_claims(temp)] == [1]
    sweep_temp_dirs()  # before each start
    assert list(read_claims(temp)) == []


def test_a_lock_that_another_account_holds_delays_a_start_by_a_second_only(
    temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(module, "list_cores", lambda: TWO)
    held = os.open(temp, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    folder = TempDir.make()
    assert claim_cores(folder, None) == (0,)
    os.close(held)
    folder.remove()


def test_the_topology_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7"}
    for cpu in range(8):
        folder = tmp_path / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings[cpu % 4] + "\n")
    for node, cpus in ((0, "0-1,4-5"), (1, "2-3,6-7")):
        folder = tmp_path / f"node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 4, 6, 7})
    expected = [Core(0, (0, 4), 0), Core(1, (1,), 0), Core(2, (2, 6), 1), Core(7, (7,), 1)]
    assert list_cores(tmp_path) == expected
    assert list_cores(tmp_path / "none") == [Core(cpu, (cpu,)) for cpu in (0, 1, 2, 4, 6, 7)]


def test_a_containers_quota_limits_the_cores(tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    for text, expected in (("400000 100000", 3), ("150000 100000", 1), ("50000 100000", 1)):
        file.write_text(text)
        assert quota(file) == expected
    for text in ("max 100000", ""):
        file.write_text(text)
        assert quota(file) == os.cpu_count()
    assert quota(tmp_path / "none") == os.cpu_count()
