"""Build an engine's `Launch` from a version of a model, on one node; for the replica and for the node agent."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from llmrun.errors import EngineError
from llmrun.lora import DEFAULT_LORA_RANK
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun_runtime.engines.base import Launch, Member, ShimConfig
from llmrun_runtime.node import variables
from llmrun_runtime.weights.cache.cache import open_cache
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.replica_config import ReplicaConfig

CACHE_DAYS = 30


def find_weights(config: ReplicaConfig, where: str) -> Path | None:
    """The folder that the engine loads; None if the pin has not been fetched yet. Raises EngineError."""
    return cached_weights(config.pin) if config.pin else local_weights(config.spec, where)


def cached_weights(pin: Pin) -> Path | None:
    """The pin's folder in this node's cache, marked as used; None if the pin is not complete there."""
    cache = open_cache(Settings())
    if not cache.find(pin.id):
        return None
    cache.touch(pin.id)
    return cache.folder(pin.id)


def local_weights(spec: ModelSpec, where: str) -> Path:
    """The folder of a model that is deployed from a path on the node. Raises EngineError."""
    if not spec.path:
        raise EngineError(f"model={spec.model.source!r}: the source has no pinned revision: deploy it again")
    path = Path(spec.path).expanduser()
    if not path.exists():
        raise EngineError(f"model={spec.model.source!r}: path not found on {where}")
    return path


def make_launch(
    config: ReplicaConfig,
    members: tuple[Member, ...],
    weights: Path,
    where: str,
    *,
    code: Path | None,
    site: Path | None,
    forkserver: Path | None,
    log: Path,
    member_rank: int = 0,
    port: int = 0,
) -> Launch:
    """The launch of member `member_rank` of an engine.

    `code` and `site` are the folders of the author's code and of its requirements.

    Reads and writes the node's home. Raises EngineError for a missing secret.
    """
    spec = config.spec
    shim = ShimConfig(model=spec.name, engine=spec.engine, hook_timeout=config.hook_timeout, host=members[0].host)
    cache = engine_cache(Settings().root, spec.name, config.version)
    if lora := spec.lora:
        lora_rank = lora.max_rank or DEFAULT_LORA_RANK
        canary = str(cache / "canary") if lora.canary else ""
        shim = replace(shim, max_loaded=lora.max_loaded, max_lora_rank=lora_rank, canary=canary)
    if spec.code and code:
        shim = replace(shim, file=str(code / spec.code.file), cls=spec.code.cls, hooks=spec.code.hooks)
    return Launch(
        names=spec.served_names,
        weights=str(weights),
        members=members,
        member_rank=member_rank,
        port=port,
        gpu_share=min(1.0, spec.gpu_count),
        cpus=spec.cpus,
        workers=math.prod(spec.parallel.values()),
        engine_args=spec.engine_args,
        python=sys.executable,
        env=engine_env(spec, site, where),
        shim=shim,
        log=log,
        cache=cache,
        task=spec.task,
        fast_start=spec.cold_start == "fast",
        forkserver=forkserver,
    )


def engine_cache(root: Path, model: str, version: int) -> Path:
    """The cache folder of the version's engines. Removes caches in which no engine started for CACHE_DAYS."""
    folder = root / "cache" / "engines" / model
    cache = folder / f"v{version}"
    cache.mkdir(parents=True, exist_ok=True)
    os.utime(cache)
    for other in folder.parent.glob("*/v*"):
        with contextlib.suppress(FileNotFoundError):  # another replica has removed it
            if time.time() - other.stat().st_mtime > CACHE_DAYS * 86400:
                shutil.rmtree(other, ignore_errors=True)
    return cache


def engine_env(spec: ModelSpec, site: Path | None, where: str) -> dict[str, str]:
    """Return the engine's variables, with the folder of its requirements. Raises EngineError for a missing secret."""
    env = variables.engine_env(spec.env, where)
    if site:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))
    return env
