"""From a version of a model to what its engine is started from, on one node; for its replica and for the node agent."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from llmrun.errors import EngineError
from llmrun.lora import USUAL_RANK
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun_runtime.engines.base import Launch, Member, ShimConfig
from llmrun_runtime.node.environments import environment
from llmrun_runtime.weights.cache.cache import open_cache
from llmrun_runtime.wire.replica_config import ReplicaConfig

CACHE_DAYS = 30


def find_weights(config: ReplicaConfig, where: str) -> Path | None:
    """The folder that the engine loads; None if it is not here yet. Raises EngineError if it never will be."""
    spec, pin = config.spec, config.pin
    if pin:
        cache = open_cache(Settings())
        if not cache.find(pin.id):
            return None
        cache.used(pin.id)
        return cache.folder(pin.id)
    if not spec.path:
        raise EngineError(f"model={spec.model.source!r}: what it means was never pinned: deploy it again")
    path = Path(spec.path).expanduser()
    if not path.exists():
        raise EngineError(f"model={spec.model.source!r}: there is no such path on {where}")
    return path


def make_launch(
    config: ReplicaConfig,
    members: tuple[Member, ...],
    weights: Path,
    where: str,
    *,
    code: Path | None,
    site: Path | None,
    warm: Path | None,
    log: Path,
    rank: int = 0,
    port: int = 0,
) -> Launch:
    """What an engine's member of that rank is started from.

    `code` and `site` are the packages of the author's code and its requirements.

    Looks at disks. Raises EngineError for a missing secret.
    """
    spec = config.spec
    shim = ShimConfig(model=spec.name, hook_timeout=config.hook_timeout, host=members[0].host)
    cache = engine_cache(Settings().root, spec.name, config.version)
    if lora := spec.lora:
        canary = str(cache / "canary") if lora.canary else ""
        rank = lora.max_rank or USUAL_RANK
        shim = replace(shim, engine=spec.engine, max_loaded=lora.max_loaded, max_rank=rank, canary=canary)
    if spec.code and code:
        shim = replace(shim, file=str(code / spec.code.file), cls=spec.code.cls, hooks=spec.code.hooks)
    return Launch(
        names=spec.served_names,
        weights=str(weights),
        members=members,
        rank=rank,
        port=port,
        gpu_share=min(1.0, spec.gpu_count),
        engine_args=spec.engine_args,
        python=sys.executable,
        env=engine_environment(spec, site, where),
        shim=shim,
        log=log,
        cache=cache,
        task=spec.task,
        fast_start=spec.cold_start == "fast",
        warm=warm,
    )


def engine_cache(root: Path, model: str, version: int) -> Path:
    """Where engines of that version keep what they may find again; those that CACHE_DAYS saw no start are removed."""
    folder = root / "cache" / "engines" / model
    mine = folder / f"v{version}"
    mine.mkdir(parents=True, exist_ok=True)
    os.utime(mine)
    for other in folder.parent.glob("*/v*"):
        with contextlib.suppress(FileNotFoundError):  # another replica was first
            if time.time() - other.stat().st_mtime > CACHE_DAYS * 86400:
                shutil.rmtree(other, ignore_errors=True)
    return mine


def engine_environment(spec: ModelSpec, site: Path | None, where: str) -> dict[str, str]:
    """The engine's variables: the node's own, then the spec's. Raises EngineError for a missing secret."""
    env = environment(spec.env, where)
    if site:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))
    return env
