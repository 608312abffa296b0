"""Which kind of node a model goes to, whether there is room, and who holds it if not. Pure: nodes are arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmrun.errors import Refused
from llmrun.spec import ModelSpec

TYPE = "accelerator_type:"  # Ray's resource of that name says which kind a node has
# A sliver of it pins the kind; whole GPUs are counted by Ray's resource GPU.
ACCELERATOR_SHARE = 0.001


@dataclass(frozen=True)
class Placement:
    """Where the replicas of a version go: CPUs, or GPUs of one kind (`""`: any), on each of so many nodes."""

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
    def all_gpus(self) -> float:
        """On all nodes together."""
        return self.gpus * self.nodes

    def resources(self) -> dict[str, float]:
        """What one replica takes of each node, in Ray's names."""
        wanted: dict[str, float] = {"CPU": self.cpus}
        if self.gpus:
            wanted["GPU"] = self.gpus
        if self.accelerator:
            wanted[TYPE + self.accelerator] = ACCELERATOR_SHARE
        return wanted


@dataclass(frozen=True)
class Node:
    """A node, or a kind of node that an autoscaler could bring (`id` is then empty)."""

    id: str
    host: str
    total: Mapping[str, float]
    available: Mapping[str, float]

    @property
    def kinds(self) -> set[str]:
        """The accelerators it has."""
        return {key.removeprefix(TYPE) for key in self.total if key.startswith(TYPE)}

    @property
    def gpus(self) -> float:
        """All its GPUs, free or not."""
        return self.total.get("GPU", 0)


def resolve(spec: ModelSpec, nodes: Sequence[Node]) -> Placement:
    """Turn what the author wrote into a placement that some node, or as many as are asked for, can hold.

    1. `"cpu"`: CPU.
    2. Nothing said: a GPU of any kind if any node has one (or GPUs were counted), else CPU.
    3. A list: the first kind that a node has.

    Raises Refused, naming what the cluster has, if no node ever could.
    """
    has_gpu = any(node.gpus for node in nodes)
    gpus = spec.gpu_count / spec.nodes
    # 1.
    if spec.on_cpu or spec.gpus == 0:
        placements = [Placement(spec.cpus, 0)]
    # 2.
    elif spec.accelerator is None:
        placements = [Placement(spec.cpus, gpus if has_gpu or spec.gpus else 0, nodes=spec.nodes)]
    # 3.
    else:
        placements = [Placement(spec.cpus, gpus, kind, spec.nodes) for kind in spec.accelerator.kinds]
    for placement in placements:
        if _enough(placement, (node for node in nodes if could_run(placement, node))):
            return placement
    wanted = " or ".join(str(placement) for placement in placements)
    what = f"accelerator={str(spec.accelerator)!r}" if spec.accelerator else f"gpus={spec.gpus}" if spec.gpus else ""
    if spec.nodes > 1:
        what = f"nodes={spec.nodes}"
    elif not what or any(
        p.gpus == 0 or _fits(Placement(0, p.gpus, p.accelerator), n.total) for p in placements for n in nodes
    ):
        what, wanted = f"cpus={spec.cpus:g}", f"{spec.cpus:g} CPUs beside {wanted}"
    raise Refused(
        f"{spec.name}: {what}: no node can give {wanted}. The cluster has {inventory(nodes)}; "
        f"change it, or add such a node",
        409,
    )


def could_run(placement: Placement, node: Node) -> bool:
    """Whether the node, were it empty, could hold a replica, or its share of one."""
    return _fits(placement, node.total)


def has_room(placement: Placement, nodes: Iterable[Node], freed: Mapping[str, Placement] | None = None) -> bool:
    """Whether a replica could be placed now; `freed`: node id → a replica there that would end first."""
    fitting = []
    for node in nodes:
        available = dict(node.available)
        if freed and node.id in freed:
            for key, amount in freed[node.id].resources().items():
                available[key] = available.get(key, 0) + amount
        if node.id and _fits(placement, available):
            fitting.append(node)
    return _enough(placement, fitting)


def inventory(nodes: Iterable[Node]) -> str:
    """What there is, in words: `2 CPUs; 1 × A10G, 8 CPUs`."""
    return "; ".join(_describe(node.total, node) for node in nodes) or "no nodes"


def shortage(placement: Placement, nodes: Sequence[Node], holders: Sequence[str]) -> str:
    """Why a replica cannot be placed now: what it needs, what is free, who holds the rest."""
    free = "; ".join(_describe(node.available, node) for node in nodes if node.id)
    needs = f"{placement.cpus:g} CPUs" + (f" and {placement}" if placement.gpus else "")
    needs += " each" if placement.nodes > 1 else ""
    held = f"held by {', '.join(holders)}" if holders else "no model of llmrun's holds the rest"
    return f"no room now: it needs {needs}; free: {free}; {held}"


def _describe(amounts: Mapping[str, float], node: Node) -> str:
    kinds = "/".join(sorted(node.kinds))
    text = [f"{amounts.get('GPU', 0):g} × {kinds or 'GPU'}"] if node.gpus or kinds else []
    return ", ".join([*text, f"{amounts.get('CPU', 0):g} CPUs"])


def _enough(placement: Placement, nodes: Iterable[Node]) -> bool:
    """Whether these are as many nodes as it spans; of a kind of node an autoscaler brings as many as are wanted."""
    found = list(nodes)
    return len(found) >= placement.nodes or any(not node.id for node in found)


def _fits(placement: Placement, amounts: Mapping[str, float]) -> bool:
    return all(amounts.get(key, 0) >= amount for key, amount in placement.resources().items())
