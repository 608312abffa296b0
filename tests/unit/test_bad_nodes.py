"""Nodes on which starts fail are set aside, and Serve places no replica there."""

from __future__ import annotations

from typing import Any

import pytest

from llmrun.settings import Settings
from llmrun_runtime import ray_internals
from llmrun_runtime.control.autoscaling import serve_apps
from llmrun_runtime.control.autoscaling.bad_nodes import SET_ASIDE_S, BadNodes, describe
from llmrun_runtime.control.autoscaling.serve_apps import ServeApps
from llmrun_runtime.control.autoscaling.serve_config import application
from llmrun_runtime.placement import Placement
from tests.support import factories

ABLE = {"a", "b"}


def failed_twice(node: str) -> BadNodes:
    nodes = BadNodes()
    for now in (0, 10):
        nodes.failed(node, f"10.0.0.{node}", "no GPU", now)
    return nodes


def test_a_node_is_set_aside_after_two_failures_for_half_an_hour() -> None:
    nodes = BadNodes()
    nodes.failed("a", "10.0.0.1", "no GPU", 0)
    assert not nodes.set_aside(ABLE, 1)
    nodes.failed("a", "10.0.0.1", "no GPU", 10)
    aside = nodes.set_aside(ABLE, 11)
    assert list(aside) == ["a"]
    text = "node 10.0.0.1 is set aside for 30 min after 2 failed starts: no GPU"
    assert describe(aside.values()) == text
    assert not nodes.set_aside(ABLE, 10 + SET_ASIDE_S)


def test_a_start_that_succeeds_clears_its_node() -> None:
    nodes = failed_twice("a")
    nodes.ready("a")
    assert not nodes.set_aside(ABLE, 11)


def test_the_last_able_node_is_not_set_aside() -> None:
    nodes = failed_twice("a")
    for now in (20, 30):
        nodes.failed("b", "10.0.0.2", "no GPU", now)
    assert not nodes.set_aside(ABLE, 31)  # the fault is the model's or the cluster's
    assert not failed_twice("a").set_aside({"a"}, 11)


def test_serve_places_no_replica_on_the_avoided_nodes() -> None:
    config = ServeApps(Settings()).replica_config(factories.deployed(factories.spec()))

    def replica_config(placement: Placement, avoid: set[str]) -> Any:
        return application(factories.spec(), placement, config, 1, 10, avoid)._bound_deployment._replica_config

    one = replica_config(Placement(1, 0), {"b2", "a1"})
    assert one.ray_actor_options["label_selector"] == {"ray.io/node-id": "!in(a1, b2)"}
    two = replica_config(Placement(1, 1, "H100", 2), {"a1"})
    assert two.placement_group_bundle_label_selector == [{"ray.io/node-id": "!in(a1)"}] * 2


async def test_avoided_nodes_change_only_when_the_target_rises_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    async def update(name: str, deployment: str, replicas: int) -> None:
        calls.append(replicas)

    async def run(function: Any, row: Any, name: str, replicas: int, avoid: frozenset[str]) -> None:
        calls.append((replicas, sorted(avoid)))

    monkeypatch.setattr(ray_internals, "update_replicas", update)
    monkeypatch.setattr(serve_apps, "_call", run)
    apps, row, bad = ServeApps(Settings()), factories.deployed(factories.spec()), frozenset({"a"})
    await apps.set_target(row, 1)
    await apps.set_target(row, 2, bad)
    await apps.set_target(row, 0, bad)
    await apps.set_target(row, 1, bad)
    await apps.set_target(row, 0, bad)
    await apps.set_target(row, 1, bad)
    assert calls == [(1, []), 2, 0, (1, ["a"]), 0, 1]
