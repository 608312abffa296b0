"""The named actors of a cluster, and how to reach them."""

from __future__ import annotations

from typing import Any

import ray

NAMESPACE = "llmrun"
CONTROL = "control"
INGRESS = "ingress"


def control_handle() -> Any:
    """A handle to control; it stays good when control is restarted. Raises ValueError where there is none."""
    return ray.get_actor(CONTROL, namespace=NAMESPACE)
