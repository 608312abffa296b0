"""The names of a cluster's actors, and handles to them."""

from __future__ import annotations

from typing import Any

import ray

NAMESPACE = "llmrun"
CONTROL = "control"
INGRESS = "ingress"
"""The name of the first ingress; see `ingress_names`."""


def ingress_names(count: int) -> list[str]:
    """The names of `count` ingresses."""
    return [INGRESS, *(f"{INGRESS}-{number}" for number in range(2, count + 1))]


def control_handle() -> Any:
    """A handle to control, which stays valid when control restarts. Raises ValueError if there is no control."""
    return ray.get_actor(CONTROL, namespace=NAMESPACE)
