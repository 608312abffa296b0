"""Replicas that live and do not report are ended once; those that stop or report again are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmrun_runtime.control import hung_replicas
from llmrun_runtime.control.hung_replicas import SILENT_S, HungReplicas
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.wire.reports import LEASE_S, ReplicaReport
from tests.support.factories import report

EXPIRED = LEASE_S + 1
DUE = EXPIRED + SILENT_S + 1


class Serve:
    """Serve runs the replica r1 until it is killed."""

    def __init__(self) -> None:
        self.running = {"r1"}
        self.killed: list[str] = []

    def kill(self, actor: str) -> bool:
        if actor not in self.running:
            return False
        self.running.remove(actor)
        self.killed.append(actor)
        return True


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serve, with its replica."""
    serve = Serve()
    monkeypatch.setattr(hung_replicas, "kill_serve_replica", serve.kill)
    return serve


async def test_a_silent_replica_is_ended_once(serve: Serve) -> None:
    registry, causes = Registry(), list[tuple[ReplicaReport, str]]()
    hung = HungReplicas(registry, lambda report, cause: causes.append((report, cause)))
    registry.report(report(), now=0)
    assert registry.expire(EXPIRED)
    for now in (EXPIRED, EXPIRED + SILENT_S):
        await hung.check(now)
        assert not serve.killed
    for _ in range(2):
        await hung.check(DUE)
    assert serve.killed == ["r1"] and not registry.silent
    [(ended, cause)] = causes
    assert ended.id == "r1" and "did not report for 20 s" in cause


async def test_a_replica_that_reports_again_or_stops_stays(serve: Serve) -> None:
    registry = Registry()
    hung = HungReplicas(registry, lambda *_: pytest.fail("it was ended"))
    later: list[Callable[[], object]] = [
        lambda: registry.report(report(), now=EXPIRED + 1),
        lambda: registry.remove("r1"),
    ]
    for after in later:
        registry.report(report(), now=0)
        registry.expire(EXPIRED)
        after()
        await hung.check(DUE)
    assert not serve.killed


async def test_a_replica_that_serve_no_longer_runs_is_forgotten(serve: Serve) -> None:
    registry = Registry()
    serve.running.clear()
    registry.report(report(), now=0)
    registry.expire(EXPIRED)
    await HungReplicas(registry, lambda *_: pytest.fail("it was ended")).check(DUE)
    assert not registry.silent


async def test_a_replica_that_cannot_be_ended_is_tried_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, hung_ids = Registry(), list[str]()
    hung = HungReplicas(registry, lambda report, _: hung_ids.append(report.id))
    registry.report(report(), now=0)
    registry.expire(EXPIRED)
    with monkeypatch.context() as broken:
        broken.setattr(hung_replicas, "kill_serve_replica", lambda actor: int(actor) > 0)  # ValueError, as Ray's
        await hung.check(DUE)
    assert registry.silent and not hung_ids
    await hung.check(DUE)
    assert serve.killed == hung_ids == ["r1"]


async def test_a_replica_that_reports_while_another_is_ended_stays(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry()
    for replica in ("r1", "r2"):
        registry.report(report(replica=replica), now=0)
    registry.expire(EXPIRED)

    def kill(actor: str) -> bool:
        registry.report(report(replica="r2"), now=DUE)
        return serve.kill(actor)

    monkeypatch.setattr(hung_replicas, "kill_serve_replica", kill)
    await HungReplicas(registry, lambda *_: None).check(DUE)
    assert serve.killed == ["r1"]
