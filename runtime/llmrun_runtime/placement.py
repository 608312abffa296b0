"""Decides which kind of node a model runs on, and whether its resources are free. Pure: nodes are arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrun.errors import Refused
from llmrun.spec import ModelSpec

ACCELERATOR_PREFIX = "accelerator_type:"  # Ray's resource with this prefix names the kind of a node's accelerators
# A tiny share of that resource restricts a replica to the kind; Ray's resource GPU counts whole GPUs.
ACCELERATOR_SHARE = 0.001


@dataclass(frozen=True)
class Placement:
    """What each replica of a version reserves: CPUs, or GPUs of one kind (`""`: any kind), on each of `nodes` nodes."""

    cpus: float
    gpus: float
    accelerator: str = ""
    nodes: int = 1

    def __str__(self) -> str:
        if not self.gpus:
            return "CPU"
        nodes = f"{self.nodes} nodes × " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus:g} × {self.accelerator or 'GPU'}"

    @property
    def total_gpus(self) -> float:
        """The GPUs on all its nodes."""
        return self.gpus * self.nodes

    def resources(self) -> dict[str, float]:
        """Return what one replica reserves on each node, by Ray's resource names."""
        amounts: dict[str, float] = {"CPU": self.cpus}
        if self.gpus:
            amounts["GPU"] = self.gpus
        if self.accelerator:
            amounts[ACCELERATOR_PREFIX + self.accelerator] = ACCELERATOR_SHARE
        return amounts

    def actor_options(self) -> dict[str, Any]:
        """Return Ray's options for an actor that reserves a replica's resources on one node."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.accelerator:
            options["resources"] = {ACCELERATOR_PREFIX + self.accelerator: ACCELERATOR_SHARE}
        return options


@dataclass(frozen=True)
class Node:
    """A node, or a kind of node that an autoscaler can add (with an empty `id`). Amounts use Ray's resource names."""

    id: str
    host: str
    total: Mapping[str, float]
    available: Mapping[str, float]

    @property
    def accelerators(self) -> set[str]:
        """The kinds of its accelerators."""
        return {key.removeprefix(ACCELERATOR_PREFIX) for key in self.total if key.startswith(ACCELERATOR_PREFIX)}

    @property
    def gpus(self) -> float:
        """All its GPUs, free or not."""
        return self.total.get("GPU", 0)


def resolve(spec: ModelSpec, nodes: Sequence[Node]) -> Placement:
    """Turn the author's options into a placement that enough nodes can hold when they are empty.

    1. `"cpu"`, or no GPUs: CPU.
    2. No accelerator: a GPU of any kind if a node has one (or `gpus=` is set), else CPU.
    3. A list of accelerators: the first kind that fits.

    Raises Refused, with the cluster's inventory, if none fits.
    """
    has_gpu = any(node.gpus for node in nodes)
    gpus = spec.gpu_count / spec.nodes
    # 1.
    if spec.on_cpu or spec.gpus == 0:
        placements = [Placement(spec.reserved_cpus, 0)]
    # 2.
    elif spec.accelerator is None:
        placements = [Placement(spec.reserved_cpus, gpus if has_gpu or spec.gpus else 0, nodes=spec.nodes)]
    # 3.
    else:
        placements = [Placement(spec.reserved_cpus, gpus, kind, spec.nodes) for kind in spec.accelerator.kinds]
    for placement in placements:
        if _are_enough(placement, (node for node in nodes if could_run(placement, node))):
            return placement
    raise Refused(_misfit(spec, placements, nodes), 409)


def _misfit(spec: ModelSpec, placements: Sequence[Placement], nodes: Sequence[Node]) -> str:
    """Say which option no node satisfies, and what the cluster has."""
    required = " or ".join(str(placement) for placement in placements)
    option = ""
    if spec.accelerator:
        option = f"accelerator={str(spec.accelerator)!r}"
    elif spec.gpus:
        option = f"gpus={spec.gpus}"
    if spec.nodes > 1:
        option = f"nodes={spec.nodes}"
    elif not option or any(
        p.gpus == 0 or _fits(Placement(0, p.gpus, p.accelerator), n.total) for p in placements for n in nodes
    ):  # the GPUs would fit: the CPUs do not
        option = f"cpus={spec.reserved_cpus:g}"
        required = f"{spec.reserved_cpus:g} CPUs" + ("" if required == "CPU" else f" and {required}")
    return (
        f"{spec.name}: {option}: no node has {required}. The cluster has {inventory(nodes)}. "
        f"Change the option, or add such a node"
    )


def could_run(placement: Placement, node: Node) -> bool:
    """Whether the node, when empty, can hold a replica, or its share of one."""
    return _fits(placement, node.total)


def has_capacity(
    placement: Placement, nodes: Iterable[Node], freed: Mapping[str, Sequence[Placement]] | None = None
) -> bool:
    """Whether a replica can be placed now. `freed`: node id → the replicas on that node that will stop first."""
    fitting = []
    for node in nodes:
        available = dict(node.available)
        for stopping in freed.get(node.id, ()) if freed else ():
            for key, amount in stopping.resources().items():
                available[key] = available.get(key, 0) + amount
        if node.id and _fits(placement, available):
            fitting.append(node)
    return _are_enough(placement, fitting)


def inventory(nodes: Iterable[Node]) -> str:
    """Describe the nodes' resources: `2 CPUs; 1 × A10G, 8 CPUs`."""
    return "; ".join(_describe(node.total, node) for node in nodes) or "no nodes"


def shortage(placement: Placement, nodes: Sequence[Node], users: Sequence[str]) -> str:
    """Say why a replica cannot be placed now. `users`: the models that use resources."""
    free = "; ".join(_describe(node.available, node) for node in nodes if node.id)
    needs = f"{placement.cpus:g} CPUs" + (f" and {placement}" if placement.gpus else "")
    needs += " each" if placement.nodes > 1 else ""
    in_use = f"in use by {', '.join(users)}" if users else "no llmrun model uses the rest"
    return f"not enough capacity: it needs {needs}; free: {free}; {in_use}"


def _describe(amounts: Mapping[str, float], node: Node) -> str:
    kinds = "/".join(sorted(node.accelerators))
    parts = [f"{amounts.get('GPU', 0):g} × {kinds or 'GPU'}"] if node.gpus or kinds else []
    return ", ".join([*parts, f"{amounts.get('CPU', 0):g} CPUs"])


def _are_enough(placement: Placement, nodes: Iterable[Node]) -> bool:
    """Whether a replica can span these nodes. An autoscaler adds any number of nodes of a kind."""
    fitting = list(nodes)
    return len(fitting) >= placement.nodes or any(not node.id for node in fitting)


def _fits(placement: Placement, amounts: Mapping[str, float]) -> bool:
    return all(amounts.get(key, 0) >= amount for key, amount in placement.resources().items())
