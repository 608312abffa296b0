"""Every use of Ray's private API, checked with Ray 2.60 (`pyproject.toml` pins that version).

Imports Ray inside its functions: the parent process of a local cluster reads a constant here, and must not load Ray.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Any

# What Serve imports in a worker that becomes a replica, and what llmrun's replica imports. Ray's workers preload these
# modules (RAY_preload_python_modules), so a spare worker becomes a replica in half a second.
PRELOADED_MODULES = "ray.serve._private.replica,llmrun_runtime.replica.deployment"
SPARE_WORKER_TITLE = "ray::IDLE"
"""The process title of a worker without a task or an actor."""


def serve_namespace() -> str:
    """The Ray namespace of Serve's actors. Needed because `serve.run` joins a Ray only in this namespace."""
    from ray.serve._private.constants import SERVE_NAMESPACE

    return str(SERVE_NAMESPACE)


def serve_job_id() -> Any:
    """The ID of the job that Serve's controller belongs to, which is the job of every replica.

    Needed to prestart a worker: a worker belongs to one job. Raises ValueError if Serve is not running.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME

    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=serve_namespace())._actor_id.job_id


def job_has_ended(job_id: Any) -> bool:
    """Whether the job's driver has ended. Needed because Ray's public job list covers only submitted jobs."""
    import ray

    return any(row["JobID"] == job_id.hex() and row["IsDead"] for row in ray._private.state.jobs())


def prestart_worker(job_id: Any, keep_alive_s: int, timeout_s: float) -> None:
    """Have this node's raylet start one idle worker of the job and keep it for `keep_alive_s`.

    Needed because Ray has no public call for it: `RAY_enable_worker_prestart` starts one worker per CPU.
    Raises RpcError.
    """
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    node_id = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    try:
        request = node_manager_pb2.PrestartWorkersRequest(
            language=0,  # Python
            job_id=job_id.binary(),
            keep_alive_duration_secs=keep_alive_s,
            num_workers=1,
        )
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=timeout_s)
    finally:
        channel.close()


def available_resources() -> dict[str, dict[str, float]]:
    """Node ID → the node's free resources. Needed because `ray.available_resources()` sums them over all nodes."""
    import ray

    resources: dict[str, dict[str, float]] = ray._private.state.state.available_resources_per_node()
    return resources


def autoscaler_node_groups() -> list[Any]:
    """The kinds of node that the cluster's autoscaler can add, each with `name` and `resources`; empty without one.

    Needed because Ray has no public call for the autoscaler's configuration.
    """
    import ray

    config = ray._private.state.state.get_cluster_config()
    return list(config.node_group_configs) if config else []


def serve_details() -> dict[str, Any]:
    """Serve's applications with their deployments. Blocks.

    Needed for the target number of replicas, which `serve.status()` omits.
    """
    from ray.serve.context import _get_global_client

    details: dict[str, Any] = _get_global_client().get_serve_details()
    return details


def kill_serve_replica(actor_id: str) -> bool:
    """Kill the replica that is this actor; return whether Serve runs it. Blocks.

    Needed because Ray finds a handle for an actor only by its name, and Serve stops a replica only in its own order.
    """
    import ray

    for app in serve_details()["applications"].values():
        for deployment in app["deployments"].values():
            for replica in deployment["replicas"]:
                if replica["actor_id"] == actor_id:
                    ray.kill(ray.get_actor(replica["actor_name"], namespace=serve_namespace()), no_restart=True)
                    return True
    return False


def serve_replica_grpc_on(host: str) -> None:
    """Have the gRPC server of the Serve replica in this process listen on its node's address only.

    Needed because Serve 2.60 starts one in every replica, for handles with `_by_reference=False`, on all interfaces.
    Ray's token protects it, but llmrun has no use for it. Call it in the deployment's constructor.
    """
    from ray._common.network_utils import build_address
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, _address: add_port(server, build_address(host, 0))


def update_replicas(app: str, deployment: str, replicas: int) -> Any:
    """Set a deployment's target number of replicas; return the call's object reference.

    Needed because the public way, Serve's HTTP API for external scalers, runs in the dashboard, which llmrun disables.
    """
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client

    deployment_id = DeploymentID(name=deployment, app_name=app)
    return _get_global_client()._controller.update_deployment_replicas.remote(deployment_id, replicas)


def read_cluster_value(key: str) -> str | None:
    """Return a value that `write_cluster_value` stored; None if there is none. Blocks.

    Needed because Ray has no public store that lives exactly as long as the cluster.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    value: bytes | None = _internal_kv_get(f"llmrun:{key}".encode())
    return value.decode() if value else None


def write_cluster_value(key: str, value: str) -> None:
    """Store a value in Ray's head for as long as the Ray cluster lives. Blocks."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"llmrun:{key}".encode(), value.encode(), overwrite=True)
