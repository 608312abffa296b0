"""When a cluster that stopped by itself starts again, and how its cause reads."""

from __future__ import annotations

from pathlib import Path

from llmrun_runtime.cluster.local import ray_failure
from llmrun_runtime.cluster.restarts import WINDOW_S, RestartPolicy


def test_a_cluster_restarts_three_times_with_growing_pauses_then_gives_up() -> None:
    policy = RestartPolicy()
    assert [policy.pause(now) for now in (0, 10, 20)] == [1, 5, 15]
    assert policy.pause(30) is None
    assert RestartPolicy().pause(0) == 1


def test_failures_that_are_long_ago_do_not_count() -> None:
    policy = RestartPolicy()
    assert [policy.pause(now * WINDOW_S * 1.1) for now in range(10)] == [1] * 10


def test_the_cause_names_the_process_without_colours(tmp_path: Path) -> None:
    log = tmp_path / "ray.log"
    prefix = "2026-11-26 01:53:26,644\tERR scripts.py:87 -- "
    log.write_text(f"Local node IP: 127.0.0.1\n{prefix}\x1b[31m\x1b[1mraylet\x1b[22m [exit code=-9]\x1b[0m\n")
    assert ray_failure(log) == "Ray's process raylet [exit code=-9] exited"
    assert ray_failure(tmp_path / "none") == f"Ray exited: see {tmp_path / 'none'}"
