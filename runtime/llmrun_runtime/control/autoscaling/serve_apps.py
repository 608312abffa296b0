"""Carries out targets through Ray Serve: one application per version of a model. Knows no rule of when."""

from __future__ import annotations

import asyncio
import logging

import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from llmrun.settings import Settings
from llmrun_runtime.control.autoscaling.serve_config import DEPLOYMENT, app_name, application, parse_app_name
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.wire.replica_config import ReplicaConfig

log = logging.getLogger("llmrun.control")
CALL_TIMEOUT_S = 30


class ServeApps:
    """The applications that exist and the targets that were set."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._targets: dict[str, int] = {}
        self._unsure: set[str] = set()
        self._deleted: set[str] = set()
        self._lock = asyncio.Lock()

    async def load(self) -> list[tuple[str, int]]:
        """Find the applications that outlived an earlier control; their (model, version)s."""
        details = await asyncio.to_thread(lambda: _get_global_client().get_serve_details())
        found = {}
        for name, app in details.get("applications", {}).items():
            parsed = parse_app_name(name)
            if parsed and app["status"] != "DELETING":
                found[name] = parsed
                deployment = app["deployments"].get(DEPLOYMENT, {})
                self._targets[name] = deployment.get("target_num_replicas") or 0
        return list(found.values())

    def target(self, model: str, version: int) -> int:
        """The target as it was last set; 0 for what was never started."""
        return self._targets.get(app_name(model, version), 0)

    def is_sure(self, model: str, version: int) -> bool:
        """Whether Serve is known to have that target; if not, it must be set again."""
        return app_name(model, version) not in self._unsure

    def doubt(self, model: str, version: int) -> None:
        """What runs is not what the target says: it must be set again."""
        if (name := app_name(model, version)) in self._targets:
            self._unsure.add(name)

    async def set_target(self, row: Deployed, replicas: int) -> None:
        """Make Serve want `replicas` replicas of the engine's version; to 0 they drain. Nothing for a deleted one.

        Raises RayError or TimeoutError; whether Serve has the target is then not known.
        """
        name = app_name(row.name, row.engine_version)
        async with self._lock:
            if name in self._deleted or (name not in self._targets and not replicas):
                return
            self._unsure.add(name)
            if name in self._targets:
                handle = DeploymentID(name=DEPLOYMENT, app_name=name)
                call = _get_global_client()._controller.update_deployment_replicas.remote(handle, replicas)
                try:
                    await asyncio.wait_for(call, CALL_TIMEOUT_S)
                except ray.exceptions.RayTaskError as error:  # it has no such application any more
                    log.info("Serve has no %s: %s", name, error.cause)
                    if replicas:
                        await asyncio.to_thread(self._run, row, name, replicas)
            else:
                self._targets[name] = replicas
                await asyncio.to_thread(self._run, row, name, replicas)
            self._targets[name] = replicas
            self._unsure.discard(name)

    async def delete(self, model: str, version: int) -> None:
        """Drain and remove the application of a version, for good. Returns when Serve has been told."""
        name = app_name(model, version)
        async with self._lock:
            self._deleted.add(name)
            self._unsure.discard(name)
            if self._targets.pop(name, None) is not None:
                await asyncio.to_thread(serve.delete, name, _blocking=False)

    async def trouble(self, model: str, version: int) -> str:
        """What Serve says is wrong with a version's replicas, in one line; "" if nothing."""
        statuses = await asyncio.to_thread(serve.status)
        app = statuses.applications.get(app_name(model, version))
        deployment = app.deployments.get(DEPLOYMENT) if app else None
        if not app or app.status not in ("DEPLOY_FAILED", "UNHEALTHY"):
            return ""
        lines = [line.strip() for line in (deployment.message if deployment else app.message).splitlines()]
        named = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
        return str((named or lines or [app.status])[-1])

    def config(self, row: Deployed) -> ReplicaConfig:
        """What the replicas of the engine's version are told."""
        return ReplicaConfig(
            spec=row.spec,
            version=row.engine_version,
            pin=row.pin,
            start_timeout=self._settings.start_timeout,
            drain_timeout=self._settings.drain_timeout,
            hook_timeout=self._settings.hook_timeout,
        )

    def _run(self, row: Deployed, name: str, replicas: int) -> None:
        app = application(row.spec, row.placement, self.config(row), replicas, self._settings.drain_timeout)
        serve.run_many(
            [serve.RunTarget(target=app, name=name, route_prefix=None, external_scaler_enabled=True)],
            wait_for_ingress_deployment_creation=True,
            wait_for_applications_running=False,
        )
