"""Turns a version of a model into a Ray Serve application."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ray import serve

from llmrun.spec import ModelSpec
from llmrun_runtime.placement import Placement
from llmrun_runtime.replica.deployment import HEALTH_CHECK_S, STOP_S, Replica
from llmrun_runtime.wire.replica_config import ReplicaConfig

PREFIX = "llmrun-"
DEPLOYMENT = "replica"
HEALTH_CHECK_TIMEOUT_S = 30
SHUTDOWN_POLL_S = 0.1
# Ray gives each node this label.
NODE_LABEL = "ray.io/node-id"


def app_name(model: str, version: int) -> str:
    """Return the name of the Serve application that runs one version of a model."""
    return f"{PREFIX}{model}-v{version}"


def parse_app_name(name: str) -> tuple[str, int] | None:
    """Return the model and version of an application of llmrun's; None for any other application."""
    model, dash, version = name.removeprefix(PREFIX).rpartition("-v")
    if not name.startswith(PREFIX) or not dash or not version.isdigit():
        return None
    return model, int(version)


def application(
    spec: ModelSpec,
    placement: Placement,
    config: ReplicaConfig,
    replicas: int,
    drain_timeout: float,
    avoid: Collection[str] = (),
) -> Any:
    """Return the Serve application (`Replica.bind(...)`) that starts with `replicas` replicas of one version.

    `avoid`: the ids of nodes on which none is placed.
    """
    options = placement.actor_options()
    selector = {NODE_LABEL: f"!in({', '.join(sorted(avoid))})"}
    # A replica is one actor on one node. An engine that spans nodes gets a placement group with a bundle per node: the
    # replica runs in the first bundle and starts the engine's other members in the others.
    group: dict[str, Any] = {}
    if placement.nodes > 1:
        group["placement_group_bundles"] = [placement.resources()] * placement.nodes
        group["placement_group_strategy"] = "STRICT_SPREAD"
        if avoid:
            group["placement_group_bundle_label_selector"] = [selector] * placement.nodes
    elif avoid:
        options["label_selector"] = selector
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=replicas,
        max_ongoing_requests=spec.max_ongoing_requests,
        ray_actor_options=options,
        health_check_period_s=HEALTH_CHECK_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_timeout + STOP_S,  # Serve then kills it, before it reports `stopped`
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
        **group,
    )(Replica)
    return deployment.bind(config.to_dict())
