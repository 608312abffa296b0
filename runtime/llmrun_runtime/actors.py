"""The cluster's actors: their names, how control and the ingresses are created, and calls to control."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import ray

from llmrun_runtime.listening import Listening

NAMESPACE = "llmrun"
CONTROL = "control"
INGRESS = "ingress"
"""The name of the first ingress; see `ingress_names`."""
# By name: control and the ingress may not import each other, and load the other's modules only to create it.
CONTROL_CLASS = "llmrun_runtime.control.actor:Control"
INGRESS_CLASS = "llmrun_runtime.ingress.actor:IngressActor"
RETRY_S = 0.2
# The time between a control's end and the next one's start: longer than `llmrun restart` needs.
MISSING_S = 5.0
# Ray marks the head node with this resource. Control's database and keys are stored there.
ON_HEAD = {"node:__internal_head__": 0.001}


@dataclass(frozen=True)
class ClusterActors:
    """Creates control and the ingresses, in whichever process notices that one is missing."""

    settings: dict[str, Any]
    listening: Listening
    generation: int = 0
    """The number of `llmrun restart`s. Ingresses of two generations exist while the older one drains."""

    @classmethod
    def of(cls, described: dict[str, Any]) -> ClusterActors:
        """Read what `asdict` returned."""
        return cls(**{**described, "listening": Listening(**described["listening"])})

    @property
    def ingress_names(self) -> list[str]:
        """The names of this generation's ingresses."""
        return ingress_names(self.settings["ingresses"], self.generation)

    def create_control(self) -> Any:
        """A handle to control, which is created if it does not exist. Raises RayError."""
        return self._create(CONTROL, CONTROL_CLASS)

    def create_ingress(self, name: str) -> Any:
        """A handle to the ingress with that name, which is created if it does not exist. Raises RayError."""
        return self._create(name, INGRESS_CLASS, name)

    def _create(self, name: str, actor_class: str, *args: Any) -> Any:
        return (
            ray.remote(resolve_name(actor_class))
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                resources=ON_HEAD,
                max_restarts=-1,
                max_concurrency=10_000,
            )
            .remote(self, *args)
        )


def ingress_names(count: int, generation: int = 0) -> list[str]:
    """The names of `count` ingresses of a generation."""
    names = [INGRESS, *(f"{INGRESS}-{number}" for number in range(2, count + 1))]
    return [f"{name}-r{generation}" if generation else name for name in names]


def ingress_generation(name: str) -> int | None:
    """The generation of an ingress; None for the name of another actor."""
    match = re.fullmatch(rf"{INGRESS}(?:-\d+)?(?:-r(\d+))?", name)
    return int(match[1] or 0) if match else None


def older_ingresses(names: Iterable[str], generation: int) -> list[str]:
    """The ingresses among `names` that a later generation replaces."""
    return sorted(name for name in names if (number := ingress_generation(name)) is not None and number < generation)


def actor_names() -> list[str]:
    """The names of llmrun's actors that have not ended. Blocks."""
    return [row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE]


def control_handle() -> Any:
    """A handle to control, which stays valid when Ray restarts it. Raises ValueError if there is no control."""
    return ray.get_actor(CONTROL, namespace=NAMESPACE)


class NoControl(ray.exceptions.RayError):  # type: ignore[misc] # Ray has no types
    """No actor is called control."""


class ControlClient:
    """Calls control by its name, also after another actor has taken the name."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._resolving: asyncio.Future[Any] | None = None

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Return the reply of a method of control. Calls it again if control was replaced meanwhile.

        Raises RayError, NoControl after MISSING_S without a control, or TimeoutError after `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            missing_since: float | None = None
            loop = asyncio.get_running_loop()
            while True:
                try:
                    handle = self._handle = self._handle or await self._resolve()
                    return await getattr(handle, method).remote(*args)
                except (NoControl, ray.exceptions.ActorDiedError) as error:
                    if isinstance(error, ray.exceptions.RayTaskError):
                        raise  # an actor died that control had called
                    self._handle = None
                    missing_since = missing_since or loop.time()
                    if loop.time() - missing_since > MISSING_S:
                        raise NoControl("no actor is called control") from error
                    await asyncio.sleep(RETRY_S)

    async def _resolve(self) -> Any:
        """Raises NoControl. The call blocks while Ray's head does not respond, so callers share one."""
        if self._resolving is None or self._resolving.done():
            self._resolving = asyncio.ensure_future(asyncio.to_thread(control_handle))
        try:
            return await asyncio.shield(self._resolving)
        except ValueError as error:
            raise NoControl("no actor is called control") from error
