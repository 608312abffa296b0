"""A spare worker of Ray's on this node: the next replica there needs no new process, nor its imports (1-2 s).

Uses the raylet's own call for it, which is internal to Ray: where it fails, replicas start as they always do.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import psutil
import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

log = logging.getLogger("ray.serve")
KEEP_S = 12 * 3600
CALL_TIMEOUT_S = 5
# The replica that took the last one needs its cores for its first answers.
AFTER_S = 5
IDLE = "ray::IDLE"


async def keep_spare() -> None:
    """See that this node has an idle worker, which Serve's next replica here becomes. Never raises."""
    await asyncio.sleep(AFTER_S)
    try:
        await asyncio.to_thread(_keep_spare)
    except Exception as error:  # noqa: BLE001 - Ray's insides: whatever they have become, replicas start without
        log.warning("no spare worker: %r", error)


def _keep_spare() -> None:
    if any(IDLE in _title(process) for process in psutil.Process().parent().children()):  # type: ignore[union-attr]
        return
    from ray._private.grpc_utils import init_grpc_channel  # noqa: PLC0415 - internal, as is all below
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc  # noqa: PLC0415

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    job = controller._actor_id.job_id  # a worker belongs to a job: to that which starts replicas
    if any(row["JobID"] == job.hex() and row["IsDead"] for row in ray._private.state.jobs()):
        return  # Ray would end it at once; a local cluster's parent keeps the job alive
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    try:
        request = node_manager_pb2.PrestartWorkersRequest(
            language=0,  # Python
            job_id=job.binary(),
            keep_alive_duration_secs=KEEP_S,
            num_workers=1,
        )
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=CALL_TIMEOUT_S)
    finally:
        channel.close()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
