"""`python -m llmrun_runtime.cluster.bootstrap`: starts, restarts or stops control and the ingress on Ray.

Ray reads the cluster's address from `RAY_ADDRESS`. The actors outlive this process. It prints its result as one line of
JSON (`{"ready": URL}`, `{"stopped": true}` or `{"error": TEXT}`), then exits, or with `--stay` reads commands. Before
the result, and during a command, it prints `{"waiting": N}`: the number of requests in flight.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import ray
from ray import serve

from llmrun.errors import ClusterError, LLMRunError
from llmrun.settings import Settings
from llmrun_runtime.actors import (
    CONTROL,
    CONTROL_CLASS,
    INGRESS_CLASS,
    NAMESPACE,
    ClusterActors,
    actor_names,
    control_handle,
    ingress_generation,
)
from llmrun_runtime.control.autoscaling.serve_config import parse_app_name
from llmrun_runtime.listening import Listening

READY_TIMEOUT_S = 60
DRAIN_S = 60  # after that, Serve continues to drain the replicas
KILL_TIMEOUT_S = 30
CALL_TIMEOUT_S = 5
POLL_S = 0.2
# How often a drain reports the number of requests in flight.
PROGRESS_S = 0.5


def start(listening: Listening) -> None:
    """Start Serve without its proxies, control and the ingress. Raises ClusterError."""
    with contextlib.suppress(ValueError):
        control_handle()
        raise ClusterError(
            "llmrun is already running on this cluster: set LLMRUN_URL to its ingress. To apply new settings or a new "
            "release, run `llmrun restart` where it was started"
        )
    actors = ClusterActors(Settings().model_dump(mode="json"), listening)
    try:
        _start_actors(actors)
    except Exception:  # also if Serve fails to start: control exists by then
        _kill_control_and_ingresses()
        if not _applications():  # applications of an earlier control stay: this one may have had a wrong database
            stop()
        raise


def _start_actors(actors: ClusterActors) -> None:
    # Each process takes a second to start, so they start in parallel. Control needs Serve. The first ingress calls
    # control at once, so it comes after control; it also checks that the port is free before the others start.
    control = actors.create_control()
    serve.start(proxy_location="Disabled")
    name, *others = actors.ingress_names
    first = actors.create_ingress(name)
    _get(control.start.remote())
    _get(first.start.remote())
    for actor in [actors.create_ingress(other) for other in others]:
        _get(actor.start.remote())


def restart() -> None:
    """Replace control and the ingresses by new ones with this process's settings and code; engines keep running.

    Raises ClusterError; then the earlier control and ingresses continue.
    """
    ingresses = {name: number for name in actor_names() if (number := ingress_generation(name)) is not None}
    if not ingresses:
        raise ClusterError("llmrun is not running on this cluster: start it with `llmrun up`")
    latest = max(ingresses, key=lambda name: ingresses[name])
    old = ClusterActors.of(_get(ray.get_actor(latest, namespace=NAMESPACE).describe.remote()))
    new = replace(old, settings=Settings().model_dump(mode="json"), generation=old.generation + 1)
    try:
        _replace_control(new)
        # Each takes over the sockets of an old one, which then ends by itself.
        for actor in [new.create_ingress(name) for name in new.ingress_names]:
            _get(actor.start.remote())
    except Exception:
        for name in new.ingress_names:
            _kill(name)
        _replace_control(old)
        raise


def _replace_control(actors: ClusterActors) -> None:
    _kill(CONTROL)
    _get(actors.create_control().start.remote())


def _kill(name: str) -> None:
    """End an actor, and wait until its name is free. Raises ClusterError."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:
            return
        time.sleep(POLL_S / 10)
    raise ClusterError(f"the actor {name} did not end within {KILL_TIMEOUT_S} s: see `ray status`")


def stop(on_waiting: Callable[[int], None] | None = None) -> None:
    """Stop llmrun's actors and applications on a Ray cluster that continues to run.

    `on_waiting`: see `drain`; None ends requests in flight at once.
    """
    if on_waiting:
        drain(Settings().drain_timeout, on_waiting)
    _kill_control_and_ingresses()
    apps = _applications()
    for name in apps:
        serve.delete(name, _blocking=False)
    deadline = time.monotonic() + DRAIN_S
    while time.monotonic() < deadline and set(apps) & set(serve.status().applications):
        time.sleep(POLL_S)
    for name in actor_names():
        _kill(name)
    if not serve.status().applications:
        serve.shutdown()


def _kill_control_and_ingresses() -> None:
    # Control first: it creates missing ingresses.
    for name in sorted(actor_names()):
        if name == CONTROL or ingress_generation(name) is not None:
            _kill(name)


def _applications() -> list[str]:
    """The names of llmrun's Serve applications."""
    return [name for name in serve.status().applications if parse_app_name(name)]


def drain(timeout: float, on_waiting: Callable[[int], None]) -> None:
    """Have the ingresses refuse new requests; return when none is in flight, or after `timeout` seconds.

    Calls `on_waiting` with the number of requests in flight.
    """
    names = [name for name in actor_names() if ingress_generation(name) is not None]
    ingresses = []
    for name in names:
        with contextlib.suppress(ValueError):  # it has just ended
            ingresses.append(ray.get_actor(name, namespace=NAMESPACE))
    pending = [ingress.drain.remote(timeout) for ingress in ingresses]
    deadline = time.monotonic() + timeout + CALL_TIMEOUT_S
    while pending and time.monotonic() < deadline:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=PROGRESS_S)
        if pending:
            with contextlib.suppress(ray.exceptions.RayError):  # one that does not respond is not waited for longer
                on_waiting(sum(ray.get([each.remaining.remote() for each in ingresses], timeout=CALL_TIMEOUT_S)))


def _get(call: Any) -> Any:
    """Raises ClusterError."""
    try:
        return ray.get(call, timeout=READY_TIMEOUT_S)
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
    parser.add_argument("action", choices=["start", "restart", "stop"])
    Listening.add_arguments(parser)
    parser.add_argument(
        "--stay", action="store_true", help="begin at the first line of standard input, exit at its end"
    )
    parser.add_argument("--now", action="store_true", help="stop: end requests in flight")
    args = parser.parse_args()
    listening = Listening.of(args)
    if args.stay:
        for name in (CONTROL_CLASS, INGRESS_CLASS):
            resolve_name(name)
        sys.stdin.readline()
    try:
        ray.init(namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
        if args.action == "start":
            start(listening)
        elif args.action == "restart":
            restart()
        else:
            stop(None if args.now else _print_waiting)
        if not args.stay:
            ray.shutdown()
    except LLMRunError as error:
        _print_result({"error": str(error)})
        return 1
    except (TimeoutError, ConnectionError, ray.exceptions.RayError) as error:
        first_line = str(error).strip().partition("\n")[0]
        _print_result({"error": f"Ray failed: {type(error).__name__}: {first_line}"})
        return 1
    _print_result({"stopped": True} if args.action == "stop" else {"ready": listening.url})
    if args.stay:
        _obey()
    return 0


def _obey() -> None:
    """Run the commands of standard input until its end: `drain`, whose last event is `{"drained": true}`."""
    for line in sys.stdin:
        if line.strip() == "drain":
            try:
                drain(Settings().drain_timeout, _print_waiting)
            except ray.exceptions.RayError as error:
                print(f"cannot drain the ingresses: {error!r}", file=sys.stderr, flush=True)
            _print_result({"drained": True})


def _print_waiting(requests: int) -> None:
    _print_result({"waiting": requests})


def _print_result(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
