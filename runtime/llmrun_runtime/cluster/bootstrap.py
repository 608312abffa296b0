"""`python -m llmrun_runtime.cluster.bootstrap`: puts control and the ingress on a Ray cluster, or takes them off.

The address is Ray's own business (`RAY_ADDRESS`); the actors outlive this process. It prints one
line of JSON, and exits or stays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from typing import Any

import ray
from ray import serve

from llmrun.errors import ClusterError, LLMRunError
from llmrun.settings import Settings
from llmrun_runtime.actors import CONTROL, INGRESS, NAMESPACE, control_handle, ingress_names
from llmrun_runtime.control.actor import Control
from llmrun_runtime.control.autoscaling.serve_config import parse_app_name
from llmrun_runtime.ingress.actor import IngressActor

READY_TIMEOUT_S = 60
DRAIN_S = 60  # then replicas go on draining by themselves, with Serve
POLL_S = 0.2
# On the head node, which Ray marks with this resource; control's database and keys lie there.
ON_HEAD = {"node:__internal_head__": 0.001}


def start(host: str, port: int, url: str, insecure: bool) -> None:
    """Start Serve without its proxies, control and the ingress. Raises ClusterError."""
    settings = Settings()
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "resources": ON_HEAD,
        "max_restarts": -1,
        "max_concurrency": 10_000,
    }
    data = settings.model_dump(mode="json")
    with contextlib.suppress(ValueError):
        control_handle()
        raise ClusterError("llmrun runs on this cluster already: set LLMRUN_URL to where its ingress listens")
    try:
        _start_actors(options, data, url, (host, port, insecure))
    except Exception:  # Serve's failure, too, which control was made before
        stop()
        raise


def _start_actors(options: dict[str, Any], data: dict[str, Any], url: str, ingress_args: tuple[str, int, bool]) -> None:
    def ingress(name: str) -> Any:
        return ray.remote(IngressActor).options(name=name, **options).remote(name, data, *ingress_args)

    # Processes take a second each to come up, so they do it side by side. Control begins when there is Serve. The first
    # ingress asks control at once, so it is made then; and it sees whether the port is free, before there are others.
    control = ray.remote(Control).options(name=CONTROL, **options).remote(data, url)
    serve.start(proxy_location="Disabled")
    name, *others = ingress_names(data["ingresses"])
    first = ingress(name)
    _get(control.start.remote())
    _get(first.start.remote())
    for actor in [ingress(other) for other in others]:
        _get(actor.start.remote())


def stop() -> None:
    """End llmrun's actors and applications on a cluster that goes on."""
    for name in sorted(_actors(), reverse=True):
        if name == CONTROL or name.startswith(INGRESS):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    ours = [name for name in serve.status().applications if parse_app_name(name)]
    for name in ours:
        serve.delete(name, _blocking=False)
    deadline = time.monotonic() + DRAIN_S
    while time.monotonic() < deadline and set(ours) & set(serve.status().applications):
        time.sleep(POLL_S)
    for name in _actors():
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    if not serve.status().applications:
        serve.shutdown()


def _actors() -> list[str]:
    """The names of llmrun's actors that there are."""
    return [row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE]


def _get(call: Any) -> None:
    try:
        ray.get(call, timeout=READY_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(f"the cluster's head gave no place within {READY_TIMEOUT_S} s: see `ray status`") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LLMRunError):
            raise error.cause from None
        raise
    except ray.exceptions.ActorDiedError as error:
        raise ClusterError(_root_cause(error)) from error


def _root_cause(error: Exception) -> str:
    """The last line of the exception that an actor died of."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    text = (named or lines or [repr(error)])[-1]
    return text.partition(": ")[2] if "llmrun" in text.partition(":")[0] else text


def main() -> None:
    """Print one JSON line on standard output: `{}`, or `{"error": …}`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--url", default="")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--stay", action="store_true", help="begin at a line of standard input; end with it")
    args = parser.parse_args()
    result: dict[str, str] = {}
    if args.stay:
        sys.stdin.readline()
    try:
        ray.init(namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
        if args.action == "start":
            start(args.host, args.port, args.url, args.insecure)
        else:
            stop()
        if args.stay:
            print(json.dumps(result), flush=True)
            sys.stdin.read()
            return
        ray.shutdown()
    except LLMRunError as error:
        result["error"] = str(error)
    except (TimeoutError, ConnectionError, ray.exceptions.RayError) as error:
        result["error"] = f"Ray cannot be used: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    print(json.dumps(result), flush=True)
    sys.exit(bool(result))


if __name__ == "__main__":
    main()
