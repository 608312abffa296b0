"""Sets targets in Ray Serve: one application per version of a model. Contains no scaling rule."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from llmrun.settings import Settings
from llmrun_runtime import ray_internals
from llmrun_runtime.control.autoscaling.serve_config import DEPLOYMENT, app_name, application, parse_app_name
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.wire.replica_config import ReplicaConfig

log = logging.getLogger("llmrun.control")
CALL_TIMEOUT_S = 30
RETRY_S = 5.0
# Longer than any call that was waiting when its application was deleted.
KEEP_DELETED_S = 3600.0


class ServeApps:
    """The Serve applications and the targets that were set."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._targets: dict[str, int] = {}
        self._unconfirmed: set[str] = set()
        """Applications that may not have the target: a call failed or is running."""
        self._avoided: dict[str, frozenset[str]] = {}
        """By application, the nodes on which Serve places no replica of it."""
        self._deleted: dict[str, float] = {}
        """By application, when it was deleted (monotonic)."""
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By application: a call to Serve that takes long delays no other model."""
        self._deleting: set[asyncio.Task[None]] = set()

    async def load(self) -> list[tuple[str, int]]:
        """Find the applications that an earlier control left running. Return their models and versions."""
        details = await asyncio.to_thread(ray_internals.serve_details)
        versions = []
        for name, app in details.get("applications", {}).items():
            version = parse_app_name(name)
            if version and app["status"] != "DELETING":
                versions.append(version)
                deployment = app["deployments"].get(DEPLOYMENT, {})
                self._targets[name] = deployment.get("target_num_replicas") or 0
        return versions

    def target(self, model: str, version: int) -> int:
        """Return the target that was last set; 0 for a version that was never started."""
        return self._targets.get(app_name(model, version), 0)

    def is_confirmed(self, model: str, version: int) -> bool:
        """Whether Serve has the target. If not, it must be set again."""
        return app_name(model, version) not in self._unconfirmed

    def mark_unconfirmed(self, model: str, version: int) -> None:
        """Record that the replicas do not match the target, so that it is set again."""
        if (name := app_name(model, version)) in self._targets:
            self._unconfirmed.add(name)

    async def set_target(self, row: Deployed, replicas: int, avoid: frozenset[str] = frozenset()) -> None:
        """Set the target of the engine version's application, creating it if necessary. At 0, its replicas drain.

        `avoid`: the ids of nodes on which no replica is placed. It takes effect when the target rises from 0: a change
        makes Serve replace all replicas. Does nothing for a deleted application. Raises RayError or TimeoutError; the
        target is then unconfirmed.
        """
        name = app_name(row.name, row.engine_version)
        async with self._lock_of(name):
            if name in self._deleted or (name not in self._targets and not replicas):
                return
            self._unconfirmed.add(name)
            moves = replicas and not self._targets.get(name) and avoid != self._avoided.get(name, frozenset())
            if name in self._targets and not moves:
                call = ray_internals.update_replicas(name, DEPLOYMENT, replicas)
                try:
                    await asyncio.wait_for(call, CALL_TIMEOUT_S)
                except ray.exceptions.RayTaskError as error:  # the application no longer exists
                    log.info("Serve has no application %s: %s", name, error.cause)
                    if replicas:
                        await _call(self._run, row, name, replicas, self._avoided.get(name, frozenset()))
            else:
                self._targets[name] = replicas
                await _call(self._run, row, name, replicas, avoid)
                self._avoided[name] = avoid
            self._targets[name] = replicas
            self._unconfirmed.discard(name)

    async def delete(self, model: str, version: int) -> None:
        """Drain and remove a version's application permanently.

        Returns when Serve has accepted the call. If Serve fails, the call is repeated in the background.
        """
        name = app_name(model, version)
        now = time.monotonic()
        deleted = self._deleted.items()
        self._deleted = {old: at for old, at in deleted if now - at < KEEP_DELETED_S or old in self._targets}
        self._deleted[name] = now
        if not await self._try_delete(name):
            task = asyncio.get_running_loop().create_task(self._delete_until_accepted(name))
            self._deleting.add(task)
            task.add_done_callback(self._deleting.discard)

    async def _try_delete(self, name: str) -> bool:
        async with self._lock_of(name):
            self._unconfirmed.discard(name)
            if name in self._targets:
                try:
                    await _call(_delete, name)
                except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
                    log.warning("Serve did not delete %s, retrying: %r", name, error)
                    return False
                del self._targets[name]
                self._avoided.pop(name, None)
        return True

    async def _delete_until_accepted(self, name: str) -> None:
        while not await self._try_delete(name):
            await asyncio.sleep(RETRY_S)

    def _lock_of(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def last_error(self, model: str, version: int) -> str:
        """Return Serve's error about a version's replicas, in one line; "" if there is none."""
        statuses = await asyncio.to_thread(serve.status)
        app = statuses.applications.get(app_name(model, version))
        deployment = app.deployments.get(DEPLOYMENT) if app else None
        if not app or app.status not in ("DEPLOY_FAILED", "UNHEALTHY"):
            return ""
        lines = [line.strip() for line in (deployment.message if deployment else app.message).splitlines()]
        errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
        return str((errors or lines or [app.status])[-1])

    def replica_config(self, row: Deployed) -> ReplicaConfig:
        """Return the configuration of the engine version's replicas."""
        return ReplicaConfig(
            spec=row.spec,
            version=row.engine_version,
            pin=row.pin,
            start_timeout=self._settings.start_timeout,
            drain_timeout=self._settings.drain_timeout,
            hook_timeout=self._settings.hook_timeout,
        )

    def _run(self, row: Deployed, name: str, replicas: int, avoid: frozenset[str]) -> None:
        config = self.replica_config(row)
        app = application(row.spec, row.placement, config, replicas, self._settings.drain_timeout, avoid)
        serve.run_many(
            [serve.RunTarget(target=app, name=name, route_prefix=None, external_scaler_enabled=True)],
            wait_for_ingress_deployment_creation=True,
            wait_for_applications_running=False,
        )


async def _call(function: Callable[..., None], *args: Any) -> None:
    """Call Serve in a thread. Raises TimeoutError after CALL_TIMEOUT_S: some of Serve's calls have no deadline."""
    async with asyncio.timeout(CALL_TIMEOUT_S):
        await asyncio.to_thread(function, *args)


def _delete(name: str) -> None:
    serve.delete(name, _blocking=False)
