"""The cores and the priority of real engines on CPU."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from llmrun_runtime.engines.process.cores import list_cores
from tests.support.cluster import Home, alive, family, make_tiny_weights, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
APP = """
@llm({weights!r}, name="{name}", accelerator="cpu", cpus=0.2, engine_args={{"kv_cache_memory_bytes": "64M"}}, {more})
class {cls}: ...
"""


def core_of(cluster: Home, model: str) -> psutil.Process:
    """The model's engine core."""
    (engine,) = cluster.engines(model)
    (core,) = [child for child in engine.children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
    return core


def test_each_engine_computes_on_cores_of_its_own(cluster: Home, tmp_path: Path) -> None:
    weights = str(make_tiny_weights(tmp_path / "weights"))
    models = {
        "forked": "",
        "plain": "env={'MALLOC_ARENA_MAX': '4'}",  # a fork server cannot change that for a child
        "own": "env={'OMP_NUM_THREADS': '1'}",  # the author's choice
    }
    text = "".join(APP.format(weights=weights, name=name, cls=name.title(), more=more) for name, more in models.items())
    cluster.ok("deploy", write_app(tmp_path / "cores" / "app.py", text))
    cores: dict[str, list[int]] = {}
    for name in models:
        cluster.ok("warm", name)
        status = cluster.status(name)
        (replica,) = status["details"]
        cores[name] = replica["cores"]
        affinity, log = core_of(cluster, name).cpu_affinity(), cluster.ok("logs", name)
        if name == "own":
            assert len(affinity) == psutil.cpu_count()
            assert "computes on CPU cores" not in log
        else:
            assert affinity == cores[name]
            named = ", ".join(map(str, cores[name]))
            assert f"the engine computes on CPU cores {named}\n" in log
            assert f"CPU cores {named}\n" in cluster.ok("status", name)
    assert [len(cores[name]) for name in models] == [1, 1, 0]
    if len(list_cores()) > 1:
        assert cores["forked"] != cores["plain"]
    nices = {process.pid: process.nice() for process in family(cluster) if alive(process)}
    nices |= {core_of(cluster, name).pid: core_of(cluster, name).nice() for name in models}
    workers = {p.pid for p in family(cluster) if alive(p) and "llmrun_runtime.weights.worker" in p.cmdline()}
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert {nice for pid, nice in nices.items() if pid not in workers} == {usual}
    for name in models:
        cluster.ok("delete", name, "--yes")
