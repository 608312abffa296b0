"""`python -m llmrun_runtime.cluster.bootstrap`: starts or stops control and the ingress on a Ray cluster.

Ray reads the cluster's address from `RAY_ADDRESS`. The actors outlive this process. It prints its result as one line of
JSON (`{"ready": URL}`, `{"stopped": true}` or `{"error": TEXT}`), then exits, or with `--stay` waits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable
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
DRAIN_S = 60  # after that, Serve continues to drain the replicas
POLL_S = 0.2
# Ray marks the head node with this resource. Control's database and keys are stored there.
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
    with contextlib.suppress(ValueError):
        control_handle()
        raise ClusterError("llmrun is already running on this cluster: set LLMRUN_URL to its ingress")
    try:
        _start_actors(options, settings.model_dump(mode="json"), url, (host, port, insecure))
    except Exception:  # also if Serve fails to start: control exists by then
        _kill_actors(lambda name: name == CONTROL or name.startswith(INGRESS))
        if not _applications():  # applications of an earlier control stay: this one may have had a wrong database
            stop()
        raise


def _start_actors(
    options: dict[str, Any], settings: dict[str, Any], url: str, ingress_args: tuple[str, int, bool]
) -> None:
    def ingress(name: str) -> Any:
        return ray.remote(IngressActor).options(name=name, **options).remote(name, settings, *ingress_args)

    # Each process takes a second to start, so they start in parallel. Control needs Serve. The first ingress calls
    # control at once, so it comes after control; it also checks that the port is free before the others start.
    control = ray.remote(Control).options(name=CONTROL, **options).remote(settings, url)
    serve.start(proxy_location="Disabled")
    name, *others = ingress_names(settings["ingresses"])
    first = ingress(name)
    _get(control.start.remote())
    _get(first.start.remote())
    for actor in [ingress(other) for other in others]:
        _get(actor.start.remote())


def stop() -> None:
    """Stop llmrun's actors and applications on a Ray cluster that continues to run."""
    _kill_actors(lambda name: name == CONTROL or name.startswith(INGRESS))
    apps = _applications()
    for name in apps:
        serve.delete(name, _blocking=False)
    deadline = time.monotonic() + DRAIN_S
    while time.monotonic() < deadline and set(apps) & set(serve.status().applications):
        time.sleep(POLL_S)
    _kill_actors(lambda _: True)
    if not serve.status().applications:
        serve.shutdown()


def _kill_actors(condition: Callable[[str], bool]) -> None:
    for name in sorted(filter(condition, _actors()), reverse=True):
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def _applications() -> list[str]:
    """The names of llmrun's Serve applications."""
    return [name for name in serve.status().applications if parse_app_name(name)]


def _actors() -> list[str]:
    """The names of llmrun's running actors."""
    return [row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE]


def _get(call: Any) -> None:
    try:
        ray.get(call, timeout=READY_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(f"the head node did not start llmrun within {READY_TIMEOUT_S} s: see `ray status`") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LLMRunError):
            raise error.cause from None
        # Ray's own text is a coloured traceback.
        reason = str(error.cause).strip().partition("\n")[0]
        text = f"llmrun failed to start: {type(error.cause).__name__}: {reason}. See control.log on the head node"
        raise ClusterError(text) from error
    except ray.exceptions.ActorDiedError as error:
        raise ClusterError(_root_cause(error)) from error


def _root_cause(error: Exception) -> str:
    """The last line of the exception that ended an actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    exceptions = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    text = (exceptions or lines or [repr(error)])[-1]
    return text.partition(": ")[2] if "llmrun" in text.partition(":")[0] else text


def main() -> int:
    """Run one action; print its result. Return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--url", default="")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument(
        "--stay", action="store_true", help="begin at the first line of standard input, exit at its end"
    )
    args = parser.parse_args()
    if args.stay:
        sys.stdin.readline()
    try:
        ray.init(namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
        if args.action == "start":
            start(args.host, args.port, args.url, args.insecure)
        else:
            stop()
        if not args.stay:
            ray.shutdown()
    except LLMRunError as error:
        _print_result({"error": str(error)})
        return 1
    except (TimeoutError, ConnectionError, ray.exceptions.RayError) as error:
        first_line = str(error).strip().partition("\n")[0]
        _print_result({"error": f"Ray failed: {type(error).__name__}: {first_line}"})
        return 1
    _print_result({"ready": args.url} if args.action == "start" else {"stopped": True})
    if args.stay:
        sys.stdin.read()
    return 0


def _print_result(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
