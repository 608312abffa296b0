"""A cluster that listens on a network, attacked from another machine of it.

`unshare -rn python -m tests.support.network_attack HOME WEIGHTS` runs the cluster in a network namespace with a cable,
and the attacker in another namespace at its other end. It prints JSON: the sockets, and what the attacker could do.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from tests.support.attacks import Listener, fuzz, listeners, refusals
from tests.support.cluster import Home, free_port, started_since, write_app

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
CLUSTER, ATTACKER, EVERYWHERE = "10.77.0.1", "10.77.0.2", "::"


def main() -> None:
    """Run both and print the result."""
    home, weights = Home(Path(sys.argv[1]), free_port()), Path(sys.argv[2])
    home.more_env["LLMRUN_URL"] = ""
    before = {process.pid for process in psutil.process_iter()}
    _ip("link set lo up")
    _ip("link add cluster type veth peer name attacker")
    _ip(f"addr add {CLUSTER}/24 dev cluster")
    _ip("link set cluster up")
    home.ok("up", "--port", str(home.port))
    key = home.ok("key", "create", "alice").split()[0]
    home.ok("down")
    home.ok("up", "--port", str(home.port), "--host", CLUSTER, "--node-ip", CLUSTER, LLMRUN_REQUIRE_KEY="true")
    try:
        text = f"@llm({str(weights)!r}, cpus=0.5, idle_timeout=600)\nclass Target: ...\n"
        home.ok("deploy", write_app(home.path.parent / "target" / "app.py", text))
        found = listeners(started_since(before))
        reachable = [replace(each, host=CLUSTER) for each in found if each.host in (CLUSTER, EVERYWHERE)]
        with _other_end(lambda: _attack(reachable)) as taken:
            body = {"model": "target", "prompt": "Hi", "max_tokens": 2}
            headers = {"authorization": f"Bearer {key}"}
            answer = httpx.post(f"http://{CLUSTER}:{home.port}/v1/completions", json=body, headers=headers, timeout=60)
            left = {process.pid for process in started_since(before)}
            result = {
                "sockets": [(each.host, each.title[:40]) for each in found],
                "taken": taken,
                "status": answer.status_code,
                "dead": [each.title for each in found if each.pid not in left],
            }
            home.ok("down")
    except BaseException:
        home.run("down")
        raise
    print(json.dumps(result))


def _attack(found: list[Listener]) -> dict[str, Any]:
    """Return what a stranger could do, by the title of the process. There should be nothing."""
    taken: dict[str, Any] = {"reached": len(found)}
    for each in found:
        if answers := refusals(each):
            taken[f"{each.title[:40]} (HTTP)"] = answers
        with grpc.insecure_channel(f"{each.host}:{each.port}") as channel:
            call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
            try:
                call(b"", timeout=2)
                taken[f"{each.title[:40]} (nodes)"] = True
            except grpc.RpcError:
                pass
    fuzz([(each.host, each.port) for each in found], seed=77, rounds=1)
    return taken


@contextlib.contextmanager
def _other_end(work: Callable[[], Any]) -> Iterator[Any]:
    """Run a function in a process of the other namespace; yield its result. The cable is cut after the block."""
    ours, theirs = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
        os.write(theirs[1], b"ready")
        os.read(ours[0], 1)  # until the cable is there
        _ip(f"addr add {ATTACKER}/24 dev attacker")
        _ip("link set attacker up")
        with os.fdopen(theirs[1], "w") as file:
            json.dump(work(), file)
        os.read(ours[0], 1)  # until the end of the block
        os._exit(0)
    os.close(theirs[1])
    try:
        assert os.read(theirs[0], 5) == b"ready"
        _ip(f"link set attacker netns {pid}")
        os.write(ours[1], b"x")
        with os.fdopen(theirs[0]) as file:
            text = file.read()
        yield json.loads(text)
    finally:
        os.write(ours[1], b"x")
        os.waitpid(pid, 0)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


if __name__ == "__main__":
    main()
