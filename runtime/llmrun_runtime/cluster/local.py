"""`python -m llmrun_runtime.cluster.local up|down`: starts or stops a local Ray cluster with llmrun.

The `up` process is the cluster's parent: `down` sends it SIGTERM, and it stops every process that writes the cluster's
logs. With `RAY_ADDRESS` set, `up` starts llmrun on that cluster instead, and exits. Imports no Ray.
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
import time
from pathlib import Path
from typing import IO, Any

import psutil

from llmrun.errors import ClusterError
from llmrun.settings import Settings, read_or_create_secret
from llmrun_runtime import http
from llmrun_runtime.cluster.bootstrap_process import (
    finish_bootstrap,
    ingress_args,
    run_bootstrap,
    start_bootstrap,
    url_of,
)
from llmrun_runtime.cluster.cluster_file import ClusterFile
from llmrun_runtime.cluster.processes import END_TIMEOUT_S, end_processes
from llmrun_runtime.ray_internals import PRELOADED_MODULES

START_TIMEOUT_S = 120
# Only code packages (at most 100 MiB) pass through Ray's object store.
OBJECT_STORE_BYTES = 256 * 2**20
# Nothing listens on this port.
NOWHERE = "http://127.0.0.1:9/"


class LocalCluster:
    """A Ray cluster with llmrun on this machine, whose parent is this process."""

    def __init__(self, settings: Settings, host: str, port: int, node_ip: str, insecure: bool) -> None:
        self._settings = settings
        self._insecure = insecure
        self._host, self._port, self._node_ip = host, port, node_ip
        self.url = url_of(host, port)
        # The folder of Ray's sockets. Their paths must be shorter than 108 bytes, so it is not in the home.
        name = hashlib.sha256(str(settings.root).encode()).hexdigest()[:10]
        self._temp = Path(tempfile.gettempdir()) / f"llmrun-{name}"
        self._ray: subprocess.Popen[bytes] | None = None
        # The driver of the job that started Serve. It stays: Ray ends the spare workers of a job that has ended.
        self._bootstrap: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start Ray, then control and the ingress. Raises ClusterError; call `end` also then."""
        if self._settings.cluster_file.exists():  # the parent was killed, and its children may still run
            down(self._settings)
        http.bind(self._host, self._port).close()
        ports = _free_ports(self._node_ip, 3)
        env = self._environment(f"{self._node_ip}:{ports[0]}")
        shutil.rmtree(self._temp, ignore_errors=True)
        self._temp.mkdir(mode=0o700)
        logs = _make_logs(self._settings)
        args = ["--stay", *ingress_args(self._host, self._port, self._insecure)]
        self._bootstrap = start_bootstrap("start", env, args, logs / "boot.log")  # does its imports while Ray starts
        self._ray = self._start_ray(env, ports, logs / "ray.log")
        self._wait_for_ray(ports[0])
        finish_bootstrap(self._bootstrap, logs / "boot.log", stays=True)
        cluster = ClusterFile(self.url, env["RAY_ADDRESS"], os.getpid(), str(self._temp))
        cluster.write(self._settings.cluster_file)

    def wait(self) -> int:
        """Return 0 at SIGTERM or SIGINT, 1 if Ray exits."""
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
        """Stop every process of the cluster, and remove its files outside of the home."""
        if self._ray:
            self._ray.kill()
            self._ray.wait()
        if self._bootstrap:
            self._bootstrap.kill()
            self._bootstrap.communicate()
        end_processes(self._temp, self._settings.root)
        self._settings.cluster_file.unlink(missing_ok=True)

    def _start_ray(self, env: dict[str, str], ports: list[int], log: Path) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--node-ip-address={self._node_ip}", f"--port={ports[0]}", f"--temp-dir={self._temp}"),
            *("--include-dashboard=false", "--include-log-monitor=false"),
            *(() if _reports_usage() else ("--disable-usage-stats",)),
            "--no-monitor",  # the autoscaler's, 84 MiB
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            # The kernel chooses every port, so two clusters on one machine do not collide.
            *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
            *(f"--ray-client-server-port={ports[1]}", f"--dashboard-port={ports[2]}"),
        ]
        with log.open("wb") as output:
            return subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def _environment(self, ray_address: str) -> dict[str, str]:
        token = self._settings.root / "ray.token"
        read_or_create_secret(token)
        env = {
            # No usage reports unless the user enables them. Ray would otherwise even report that they are disabled.
            **({} if _reports_usage() else {"RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_REPORT_URL": NOWHERE}),
            "DO_NOT_TRACK": "1",
            **os.environ,
            "LLMRUN_HOME": str(self._settings.root),
            "RAY_ADDRESS": ray_address,
            # Start workers on demand only: each takes 80 MiB.
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_preload_python_modules": PRELOADED_MODULES,
        }
        if self._node_ip in http.LOOPBACK:
            # Without this Ray looks for an address that other machines can reach, and listens on it.
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


def join(settings: Settings, host: str, port: int, insecure: bool) -> str:
    """Start llmrun on the Ray cluster at `RAY_ADDRESS`; return the ingress's URL. Raises ClusterError."""
    settings.make_home()
    log = _make_logs(settings) / "boot.log"
    run_bootstrap("start", dict(os.environ), ingress_args(host, port, insecure), log)
    cluster = ClusterFile(url_of(host, port), os.environ["RAY_ADDRESS"])
    cluster.write(settings.cluster_file)
    return cluster.url


def down(settings: Settings) -> bool:
    """Stop this home's cluster; return False if none is running. Raises ClusterError if it does not stop."""
    cluster = ClusterFile.read(settings.cluster_file)
    if not cluster:
        return False
    if not cluster.pid:
        env = {**os.environ, "RAY_ADDRESS": cluster.ray_address}
        run_bootstrap("stop", env, [], settings.root / "logs" / "boot.log")
        settings.cluster_file.unlink(missing_ok=True)
        return True
    if parent := _find_parent(cluster.pid):
        parent.send_signal(signal.SIGTERM)
        try:
            parent.wait(4 * END_TIMEOUT_S)
        except psutil.TimeoutExpired:
            raise ClusterError(f"process {parent.pid} did not exit within {4 * END_TIMEOUT_S} s: kill it") from None
    else:
        # The parent was killed; Ray's processes and engines may still run.
        end_processes(Path(cluster.temp), settings.root)
        settings.cluster_file.unlink(missing_ok=True)
    return True


def _find_parent(pid: int) -> psutil.Process | None:
    """The process with that ID if it is a cluster's parent: the ID may belong to another process by now."""
    try:
        process = psutil.Process(pid)
        return process if process.cmdline()[1:3] == ["-m", "llmrun_runtime.cluster.local"] else None
    except psutil.NoSuchProcess:
        return None


def _make_logs(settings: Settings) -> Path:
    logs = settings.root / "logs"
    logs.mkdir(exist_ok=True)
    return logs


def _free_ports(host: str, count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        return [int(sock.getsockname()[1]) for sock in sockets]


def lock_home(settings: Settings) -> IO[str]:
    """Allow one parent per home. Raises ClusterError if there is one already."""
    settings.make_home()
    lock = (settings.root / "up.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ClusterError(f"a cluster is already running in {settings.root}: {settings.resolved_url()}") from None
    return lock


def _redirect_output(log: Path) -> None:
    """Send this process's output to `log`: from now on nothing reads the standard output."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _reports_usage() -> bool:
    """Whether the user has enabled Ray's usage reports."""
    return os.environ.get("RAY_USAGE_STATS_ENABLED") == "1"


def _emit(event: dict[str, Any]) -> None:
    """Print an event as one line of JSON, for the command line."""
    print(json.dumps(event), flush=True)


def main() -> int:
    """Run `up` or `down`. A local cluster's `up` returns when the cluster stops.

    Prints events: `{"ready": URL}`, `{"stopped": BOOL}`, `{"error": TEXT}`; in the foreground, text for people.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--node-ip", default="127.0.0.1")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--detach", action="store_true", help="print events; log to a file once ready")
    args = parser.parse_args()
    settings = Settings()
    for_people = args.action == "up" and not args.detach
    try:
        if args.action == "down":
            _emit({"stopped": down(settings)})
            return 0
        if os.environ.get("RAY_ADDRESS"):
            _report_ready(join(settings, args.host, args.port, args.insecure), for_people)
            return 0
        with lock_home(settings):
            cluster = LocalCluster(settings, args.host, args.port, args.node_ip, args.insecure)
            try:
                cluster.start()
                _report_ready(cluster.url, for_people)
                if args.detach:
                    _redirect_output(settings.root / "logs" / "cluster.log")
                return cluster.wait()
            finally:
                cluster.end()
    except ClusterError as error:
        if for_people:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            _emit({"error": str(error)})
        return 1


def _report_ready(url: str, for_people: bool) -> None:
    if for_people:
        print(f"llmrun is running at {url}", flush=True)
    else:
        _emit({"ready": url})


if __name__ == "__main__":
    sys.exit(main())
