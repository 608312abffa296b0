"""`python -m llmrun_runtime.cluster.local up`: starts a local Ray with llmrun on it, watches over it, and ends all of it.

This process is the cluster's parent: `down` (SIGTERM) ends it, and it ends everything that
writes the cluster's logs. With `RAY_ADDRESS` set it puts llmrun on that cluster instead, and exits. Imports no Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

from llmrun.errors import ClusterError
from llmrun.settings import Settings, secret_file
from llmrun_runtime import http
from llmrun_runtime.cluster.processes import END_TIMEOUT_S, end_processes

START_TIMEOUT_S = 120
# What a new worker of Ray's imports at once: the spare one of a node then becomes a replica in half a second.
PRELOAD = "ray.serve._private.replica,llmrun_runtime.replica.deployment"
# Code packages (100 MiB at most) are all that goes through Ray's object store.
OBJECT_STORE_BYTES = 256 * 2**20
# Nobody listens there.
NOWHERE = "http://127.0.0.1:9/"


class Cluster:
    """A local cluster of this home."""

    def __init__(self, settings: Settings, host: str, port: int, node_ip: str, insecure: bool) -> None:
        self._settings = settings
        self._insecure = insecure
        self._host, self._port, self._node_ip = host, port, node_ip
        # Ray's sockets lie here; their paths must stay under 108 bytes, so not in the home.
        name = hashlib.sha256(str(settings.root).encode()).hexdigest()[:10]
        self.url = url_of(host, port)
        self._temp = Path(tempfile.gettempdir()) / f"llmrun-{name}"
        self._ray: subprocess.Popen[bytes] | None = None
        # The job that started Serve: Ray ends spare workers of a job that is over.
        self._boot: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start Ray, then control and the ingress. Raises ClusterError; nothing is left then."""
        if self._settings.cluster_file.exists():  # a parent that was killed left it, and its children
            down(self._settings)
        http.bind(self._host, self._port).close()
        ports = _free_ports(self._node_ip, 3)
        ray_port = ports[0]
        env = self._environment(f"{self._node_ip}:{ray_port}")
        shutil.rmtree(self._temp, ignore_errors=True)
        self._temp.mkdir(mode=0o700)
        logs = self._settings.root / "logs"
        logs.mkdir(exist_ok=True)
        args = ["--stay", *ingress_args(self._host, self._port, self._insecure)]
        self._boot = start_bootstrap("start", env, args, logs / "boot.log")  # it imports what it needs while Ray starts
        with (logs / "ray.log").open("wb") as log:
            self._ray = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                    *(f"--node-ip-address={self._node_ip}", f"--port={ray_port}", f"--temp-dir={self._temp}"),
                    *("--include-dashboard=false", "--include-log-monitor=false"),
                    *(() if _counted() else ("--disable-usage-stats",)),
                    "--no-monitor",  # an autoscaler's, 84 MiB
                    f"--object-store-memory={OBJECT_STORE_BYTES}",
                    # Every port the kernel's choice: two clusters on one machine do not meet.
                    *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
                    *(f"--ray-client-server-port={ports[1]}", f"--dashboard-port={ports[2]}"),
                ],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_for_ray(ray_port)
        read_bootstrap(self._boot, logs / "boot.log", stays=True)
        write_cluster_file(
            self._settings,
            {"url": self.url, "pid": os.getpid(), "temp": str(self._temp), "ray_address": env["RAY_ADDRESS"]},
        )

    def wait(self) -> int:
        """Return when a signal comes (0) or Ray ends by itself (1)."""
        stop = False

        def on_signal(*_: object) -> None:
            nonlocal stop
            stop = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        while not stop:
            if self._ray and self._ray.poll() is not None:
                return 1
            time.sleep(0.1)
        return 0

    def end(self) -> None:
        """End every process of the cluster, and leave no file of it but the home."""
        if self._ray:
            self._ray.kill()
            self._ray.wait()
        if self._boot:
            self._boot.kill()
            self._boot.communicate()
        end_processes(self._temp, self._settings.root)
        self._settings.cluster_file.unlink(missing_ok=True)

    def _environment(self, ray_address: str) -> dict[str, str]:
        token = self._settings.root / "ray.token"
        secret_file(token)
        env = {
            # Nobody is told anything, unless somebody wants it so. That it is switched off Ray would report, too.
            **({} if _counted() else {"RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_REPORT_URL": NOWHERE}),
            "DO_NOT_TRACK": "1",
            **os.environ,
            "LLMRUN_HOME": str(self._settings.root),
            "RAY_ADDRESS": ray_address,
            # No worker before it is asked for: each takes 80 MiB.
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_preload_python_modules": PRELOAD,
        }
        if self._node_ip in http.LOOPBACK:
            # Ray otherwise looks for an address that other machines reach, and listens on that.
            env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if "RAY_AUTH_MODE" not in env:
            env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        return env

    def _wait_for_ray(self, port: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._ray and self._ray.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((self._node_ip, port), timeout=1):
                return
            time.sleep(0.1)
        raise ClusterError(f"Ray did not start: see {self._settings.root / 'logs' / 'ray.log'}")


def url_of(host: str, port: int) -> str:
    """Where clients on this machine reach what listens there."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::", "localhost") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def boot(action: str, env: dict[str, str], args: list[str], log: Path) -> None:
    """Run `llmrun_runtime.cluster.bootstrap`. Raises ClusterError."""
    read_bootstrap(start_bootstrap(action, env, args, log), log)


def start_bootstrap(action: str, env: dict[str, str], args: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `llmrun_runtime.cluster.bootstrap`."""
    command = [sys.executable, "-m", "llmrun_runtime.cluster.bootstrap", action, *args]
    with log.open("wb") as errors:
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)


def read_bootstrap(process: subprocess.Popen[bytes], log: Path, *, stays: bool = False) -> None:
    """Wait until it has said how it went; one that `stays` is told that Ray runs, and lives on. Raises ClusterError."""
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):  # it has died: that it says nothing tells
        process.stdin.write(b"\n")
        process.stdin.flush()
    overdue = threading.Timer(START_TIMEOUT_S, process.kill)
    overdue.start()
    # Ray says things there, too.
    line = next((line for line in map(bytes.decode, process.stdout) if line.startswith("{")), "")
    late = not overdue.is_alive()
    overdue.cancel()
    result = json.loads(line) if line else {"error": f"it failed: see {log}"}
    if late:
        result = {"error": f"the cluster did not answer within {START_TIMEOUT_S} s: see {log}"}
    if "error" in result or not stays:
        process.communicate()
    if "error" in result:
        raise ClusterError(result["error"])


def ingress_args(host: str, port: int, insecure: bool) -> list[str]:
    """For `boot start`."""
    said = ["--host", host, "--port", str(port), "--url", url_of(host, port)]
    return [*said, "--insecure"] if insecure else said


def join(settings: Settings, host: str, port: int, insecure: bool) -> str:
    """Put llmrun on the cluster at `RAY_ADDRESS`; the ingress's URL. Raises ClusterError."""
    settings.make_home()
    (settings.root / "logs").mkdir(exist_ok=True)
    url = url_of(host, port)
    boot("start", dict(os.environ), ingress_args(host, port, insecure), settings.root / "logs" / "boot.log")
    write_cluster_file(settings, {"url": url, "pid": 0, "temp": "", "ray_address": os.environ["RAY_ADDRESS"]})
    return url


def down(settings: Settings) -> bool:
    """End this home's cluster; False if none runs. Raises ClusterError if it does not end."""
    try:
        cluster = json.loads(settings.cluster_file.read_text())
    except (OSError, ValueError):
        return False
    if not cluster["pid"]:
        env = {**os.environ, "RAY_ADDRESS": cluster["ray_address"]}
        boot("stop", env, [], settings.root / "logs" / "boot.log")
        settings.cluster_file.unlink(missing_ok=True)
        return True
    try:
        parent = psutil.Process(cluster["pid"])
        ours = parent.cmdline()[1:3] == ["-m", "llmrun_runtime.cluster.local"]
    except psutil.NoSuchProcess:
        ours = False
    if ours:
        parent.send_signal(signal.SIGTERM)
        try:
            parent.wait(4 * END_TIMEOUT_S)
        except psutil.TimeoutExpired:
            raise ClusterError(f"process {parent.pid} does not end: end it yourself") from None
    else:
        # Its parent was killed: Ray's processes and engines may live on.
        end_processes(Path(cluster["temp"]), settings.root)
        settings.cluster_file.unlink(missing_ok=True)
    return True


def write_cluster_file(settings: Settings, data: dict[str, Any]) -> None:
    """Say how the cluster can be reached, all at once."""
    draft = settings.cluster_file.with_suffix(".new")
    draft.write_text(json.dumps(data))
    draft.replace(settings.cluster_file)


def _free_ports(host: str, count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        return [int(sock.getsockname()[1]) for sock in sockets]


def _lock(settings: Settings) -> IO[str]:
    """One parent per home. Raises ClusterError if there is one."""
    settings.make_home()
    lock = (settings.root / "up.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ClusterError(f"a cluster of {settings.root} runs already at {settings.resolved_url()}") from None
    return lock


def _detach(log: Path) -> None:
    """From now on nobody listens to our standard output."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def main() -> int:
    """Say `ready URL` or `error: …` on standard output; then, for a local cluster, stay."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--node-ip", default="127.0.0.1")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--detach", action="store_true")
    args = parser.parse_args()
    settings = Settings()
    try:
        if args.action == "down":
            print("ended" if down(settings) else "none", flush=True)
            return 0
        if os.environ.get("RAY_ADDRESS"):
            print(f"ready {join(settings, args.host, args.port, args.insecure)}", flush=True)
            return 0
        lock = _lock(settings)
        cluster = Cluster(settings, args.host, args.port, args.node_ip, args.insecure)
        try:
            cluster.start()
            print(f"ready {cluster.url}", flush=True)
            if args.detach:
                _detach(settings.root / "logs" / "cluster.log")
            return cluster.wait()
        finally:
            cluster.end()
            lock.close()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stdout if args.detach or args.action == "down" else sys.stderr, flush=True)
        return 1


def _counted() -> bool:
    """Whether somebody has asked for Ray's usage reports."""
    return os.environ.get("RAY_USAGE_STATS_ENABLED") == "1"


if __name__ == "__main__":
    sys.exit(main())
