"""Which cores an engine without a GPU computes on: its own ones, while the machine has enough.

vLLM gives its one engine all cores of a NUMA node but the last, one thread for each physical core. llmrun does the same
for several engines: one with `cpus=` gets as many cores as it reserves, others get those that no engine has reserved.
Each takes the least used ones. The last core is given away last: API servers, the ingress and Ray run there.

A claim is a file in the engine's temporary folder, so it ends with the folder, also if the replica is killed, and it
counts for all clusters of the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmrun_runtime.engines.process.temp_dir import PREFIX, TempDir

log = logging.getLogger("ray.serve")
FILE = "cores.json"
SYSTEM = Path("/sys/devices/system")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
LOCK_TIMEOUT_S = 1.0
LOCK_POLL_S = 0.01


@dataclass(frozen=True)
class Core:
    """A physical core: the CPU that an engine's thread runs on, all its CPUs (two with SMT), and its NUMA node."""

    cpu: int
    cpus: tuple[int, ...]
    numa: int = 0


@dataclass(frozen=True)
class Claim:
    """The cores of one engine, by their CPUs; `cpus`: what it reserves, None if it takes what is free."""

    cores: tuple[int, ...]
    cpus: float | None


def choose(cores: Sequence[Core], claims: Sequence[Claim], cpus: float | None, limit: int) -> list[Core]:
    """Return the cores of an engine that reserves `cpus` CPUs (None: all that are free), `limit` at most.

    All are on one NUMA node. At least one; [] without cores.
    """
    reserved: Counter[int] = Counter()  # in thousandths of a core
    shared: Counter[int] = Counter()
    for claim in claims:
        if claim.cpus is None:
            shared.update(claim.cores)
        else:
            part = round(1000 * claim.cpus / len(claim.cores)) if claim.cores else 0
            reserved.update(dict.fromkeys(claim.cores, part))
    rest = cores[-1].cpu if len(cores) > 1 else None
    best: tuple[tuple[int, int, int, int], list[Core]] | None = None
    for numa in sorted({core.numa for core in cores}):
        mine = [core for core in cores if core.numa == numa]
        mine.sort(key=lambda core: (reserved[core.cpu], shared[core.cpu], core.cpu == rest, core.cpu))
        others = [core for core in mine if core.cpu != rest]
        if cpus is None:
            wanted = sum(not reserved[core.cpu] for core in others)
        else:
            wanted = min(math.ceil(cpus / len(mine[0].cpus)), len(others))
        chosen = mine[: max(1, min(wanted, limit))]
        used = sum(reserved[core.cpu] for core in chosen), sum(shared[core.cpu] for core in chosen)
        rank = (-len(chosen), *used, numa)
        if best is None or rank < best[0]:
            best = rank, chosen
    return sorted(best[1], key=lambda core: core.cpu) if best else []


def claim_cores(temp_dir: TempDir, cpus: float | None) -> tuple[int, ...]:
    """Claim cores for the engine with this temporary folder; return their CPUs. () if the system does not name any."""
    cores = list_cores()
    with _locked(temp_dir.path.parent):
        claims = list(read_claims(temp_dir.path.parent))
        chosen = tuple(core.cpu for core in choose(cores, claims, cpus, quota()))
        (temp_dir.path / FILE).write_text(json.dumps({"cores": chosen, "cpus": cpus}))
    return chosen


def read_claims(folder: Path) -> Iterator[Claim]:
    """The claims of all engines with temporary folders in `folder`; not those of other users."""
    for file in folder.glob(f"{PREFIX}*/{FILE}"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            data = json.loads(file.read_text())
            yield Claim(tuple(map(int, data["cores"])), None if data["cpus"] is None else float(data["cpus"]))


def list_cores(system: Path = SYSTEM) -> list[Core]:
    """The physical cores that this process may use; [] if the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed = os.sched_getaffinity(0)
    nodes: dict[int, int] = {}
    for folder in system.glob("node/node[0-9]*"):
        nodes |= dict.fromkeys(_read_list(folder / "cpulist"), int(folder.name.removeprefix("node")))
    cores: dict[int, Core] = {}
    for cpu in sorted(allowed):
        siblings = _read_list(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") & allowed or {cpu}
        first = min(siblings)
        cores.setdefault(first, Core(first, tuple(sorted(siblings)), nodes.get(cpu, 0)))
    return list(cores.values())


def quota(file: Path = QUOTA) -> int:
    """The most cores that an engine may use, by the container's CPU quota: one less, for the rest."""
    try:
        share, period = file.read_text().split()
        return max(1, math.ceil(int(share) / int(period)) - 1)
    except (OSError, ValueError):  # no container, or "max"
        return os.cpu_count() or 1


def parse_cpus(text: str) -> list[int]:
    """The numbers of a list like `0-3,8`, in its order. Raises ValueError."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _read_list(file: Path) -> set[int]:
    """The numbers of a file's list; empty if the file does not exist."""
    try:
        return set(parse_cpus(file.read_text()))
    except (OSError, ValueError):
        return set()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder of all temporary folders; go on without it after LOCK_TIMEOUT_S.

    Any account can hold it. Two engines that start at the same moment may then share cores.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    log.warning("choosing cores without a lock: another process holds the one of %s", folder)
                    break
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
