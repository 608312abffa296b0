"""Specs → Ray Serve configuration, and nothing else."""

from __future__ import annotations

from typing import Any

from ray import serve

from llmrun.spec import ModelSpec
from llmrun_runtime.placement import ACCELERATOR_SHARE, TYPE, Placement
from llmrun_runtime.replica.deployment import Replica
from llmrun_runtime.wire.replica_config import ReplicaConfig

PREFIX = "llmrun-"
DEPLOYMENT = "replica"
# Serve replaces a replica whose engine died after three looks.
HEALTH_CHECK_S = 1


def app_name(model: str, version: int) -> str:
    """The Serve application of one version of a model."""
    return f"{PREFIX}{model}-v{version}"


def parse_app_name(name: str) -> tuple[str, int] | None:
    """The model and version of one of our applications; None for anybody else's."""
    model, dash, version = name.removeprefix(PREFIX).rpartition("-v")
    if not name.startswith(PREFIX) or not dash or not version.isdigit():
        return None
    return model, int(version)


def actor_options(placement: Placement) -> dict[str, Any]:
    """What Ray reserves for a replica, on one node."""
    options: dict[str, Any] = {"num_cpus": placement.cpus, "num_gpus": placement.gpus}
    if placement.accelerator:
        options["resources"] = {TYPE + placement.accelerator: ACCELERATOR_SHARE}
    return options


def application(spec: ModelSpec, placement: Placement, config: ReplicaConfig, replicas: int, drain: float) -> Any:
    """The Serve application (`Replica.bind(...)`) that runs `replicas` copies of one version at first."""
    # One actor, so one node. What spans nodes has a group of places, each on a node of its own; the replica is in the
    # first, and brings the engine's other members into the rest.
    group: dict[str, Any] = {}
    if placement.nodes > 1:
        group["placement_group_bundles"] = [placement.resources()] * placement.nodes
        group["placement_group_strategy"] = "STRICT_SPREAD"
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=replicas,
        max_ongoing_requests=spec.max_ongoing_requests,
        ray_actor_options=actor_options(placement),
        health_check_period_s=HEALTH_CHECK_S,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.1,
        **group,
    )(Replica)
    return deployment.bind(config.to_dict())
