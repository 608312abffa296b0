"""The named actors of a cluster, and how to reach them."""

from __future__ import annotations

from typing import Any

import ray

NAMESPACE = "llmrun"
CONTROL = "control"
INGRESS = "ingress"
"""The first one; see `ingress_names`."""


def ingress_names(count: int) -> list[str]:
    """The names of so many ingresses."""
    return [INGRESS, *(f"{INGRESS}-{number}" for number in range(2, count + 1))]


def control_handle() -> Any:
    """A handle to control; it stays good when control is restarted. Raises ValueError where there is none."""
    return ray.get_actor(CONTROL, namespace=NAMESPACE)
