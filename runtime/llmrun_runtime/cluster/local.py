"""`python -m llmrun_runtime.cluster.local up|restart|down`: starts, restarts or stops a local Ray cluster with llmrun.

The `up` process is the cluster's parent: `down` sends it SIGTERM, and it stops every process that writes the cluster's
logs. It starts the cluster again if Ray dies. With `RAY_ADDRESS` set, `up` starts llmrun on that cluster instead, and
exits. Imports no Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

from llmrun.errors import ClusterError
from llmrun.settings import LOOPBACK, Settings, read_or_create_secret
from llmrun_runtime import http
from llmrun_runtime.cluster.bootstrap_process import (
    BootstrapProcess,
    run_bootstrap,
)
from llmrun_runtime.cluster.cluster_file import ClusterFile
from llmrun_runtime.cluster.processes import END_TIMEOUT_S, end_processes
from llmrun_runtime.cluster.restarts import RestartPolicy
from llmrun_runtime.listening import Listening
from llmrun_runtime.ray_internals import PRELOADED_MODULES

START_TIMEOUT_S = 120
RESTART_TIMEOUT_S = 300
STOP_TIMEOUT_S = 120
# The drain's own timeout comes first.
DRAIN_MARGIN_S = 10
POLL_S = 0.1
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Only code packages (at most 100 MiB) pass through Ray's object store.
OBJECT_STORE_BYTES = 256 * 2**20
# The range of ports from which the kernel chooses.
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_PORT = 20_000
# Nothing listens on this port.
NOWHERE = "http://127.0.0.1:9/"


class LocalCluster:
    """A Ray cluster with llmrun on this machine, whose parent is this process."""

    def __init__(self, settings: Settings, listening: Listening, node_ip: str) -> None:
        self._settings = settings
        self._listening, self._node_ip = listening, node_ip
        self.url = listening.url
        # The folder of Ray's sockets. Their paths must be shorter than 108 bytes, so it is not in the home.
        name = hashlib.sha256(str(settings.root).encode()).hexdigest()[:10]
        self._temp = Path(tempfile.gettempdir()) / f"llmrun-{name}"
        self._ports: list[int] = []
        self._ray: subprocess.Popen[bytes] | None = None
        # The driver of the job that started Serve. It stays: Ray ends the spare workers of a job that has ended.
        self._bootstrap: BootstrapProcess | None = None
        self._signals = 0
        """How many SIGTERM and SIGINT this process has received: one drains, a second one stops at once."""

    def start(self) -> None:
        """Start Ray, then control and the ingress. Raises ClusterError; call `end` also then."""
        if self._settings.cluster_file.exists():  # the parent was killed, and its children may still run
            down(self._settings)
        self._settings.stopped_file.unlink(missing_ok=True)
        # The same ports after a restart, so that other nodes find the cluster at its address.
        self._ports = free_ports(self._node_ip, 3)
        self._start()

    def _start(self) -> None:
        self._listening.tls()
        _check_ray_auth(self._node_ip)
        http.bind(self._listening.host, self._listening.port).close()
        address = f"{self._node_ip}:{self._ports[0]}"
        env = _environment(self._settings, address)
        self._temp = _new_temp(self._temp)
        logs = _make_logs(self._settings)
        args = ["--stay", *self._listening.arguments()]
        self._bootstrap = BootstrapProcess("start", env, args, logs / "boot.log")  # does its imports while Ray starts
        self._ray = self._start_ray(env, self._ports, logs / "ray.log")
        self._wait_for_ray(self._ports[0])
        self._bootstrap.finish()
        cluster = ClusterFile(self.url, address, os.getpid(), str(self._temp), self._listening.tls_cert)
        cluster.write(self._settings.cluster_file)

    def run(self, on_waiting: Callable[[int], None]) -> None:
        """Return at SIGTERM or SIGINT, when the requests in flight have ended. Starts the cluster again if Ray exits.

        `on_waiting` receives the number of requests in flight. Raises ClusterError if the cluster does not stay up.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        policy = RestartPolicy()
        while cause := self._wait():
            while cause:
                pause = policy.pause(time.monotonic())
                if pause is None:
                    self._give_up(cause)
                _log(f"the cluster stopped: {cause}. Starting it again in {pause:g} s")
                self._end_processes()
                if self._sleep(pause):
                    return
                cause = self._try_start()
            _log("the cluster is running again")
        if self._bootstrap:
            timeout = self._settings.drain_timeout + DRAIN_MARGIN_S
            self._bootstrap.drain(timeout, lambda: self._signals > 1, on_waiting)

    def _on_signal(self, *_: object) -> None:
        self._signals += 1

    def _wait(self) -> str:
        """Return "" at a signal, the cause when Ray exits."""
        while not self._signals:
            if self._ray and self._ray.poll() is not None:
                return ray_failure(_logs(self._settings) / "ray.log")
            time.sleep(POLL_S)
        return ""

    def _sleep(self, seconds: float) -> bool:
        """Return whether a signal has arrived."""
        deadline = time.monotonic() + seconds
        while not self._signals and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return bool(self._signals)

    def _try_start(self) -> str:
        """Start the cluster; return why that failed, "" if it did not."""
        try:
            self._start()
        except ClusterError as error:
            return str(error)
        return ""

    def _give_up(self, cause: str) -> NoReturn:
        """Leave the cause for `llmrun status`. Raises ClusterError."""
        _log(f"the cluster stopped: {cause}. It has stopped too often to start it again")
        self._settings.stopped_file.write_text(json.dumps({"at": time.time(), "cause": cause}))
        raise ClusterError(f"the cluster stopped: {cause}. See {_logs(self._settings) / 'ray.log'}")

    def end(self) -> None:
        """Stop every process of the cluster, and remove its files outside of the home."""
        self._end_processes()
        self._settings.cluster_file.unlink(missing_ok=True)

    def _end_processes(self) -> None:
        if self._ray:
            self._ray.kill()
            self._ray.wait()
        if self._bootstrap:
            self._bootstrap.end()
        end_processes(self._temp, self._settings.root)

    def _start_ray(self, env: dict[str, str], ports: list[int], log: Path) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block"),
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

    def _wait_for_ray(self, port: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._ray and self._ray.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((self._node_ip, port), timeout=1):
                return
            time.sleep(0.1)
        raise ClusterError(f"Ray did not start: see {self._settings.root / 'logs' / 'ray.log'}")


def _new_temp(path: Path) -> Path:
    """Return a new folder for Ray's sockets, at another path if one of another user is in the way."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent))
    return path


def _check_ray_auth(node_ip: str) -> None:
    """Raise ClusterError if whoever reaches Ray's ports from another machine could run code."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token" and node_ip not in LOOPBACK:
        raise ClusterError(
            f"RAY_AUTH_MODE={mode} with --node-ip {node_ip}: every machine that reaches Ray's ports could run code. "
            f"Unset RAY_AUTH_MODE: llmrun then gives Ray a token"
        )


def _environment(settings: Settings, ray_address: str) -> dict[str, str]:
    """The environment of Ray and of its drivers."""
    token = settings.root / "ray.token"
    read_or_create_secret(token)
    env = {
        # No usage reports unless the user enables them. Ray would otherwise even report that they are disabled.
        **({} if _reports_usage() else {"RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_REPORT_URL": NOWHERE}),
        "DO_NOT_TRACK": "1",
        # Its Prometheus exporter listens on all interfaces, without a token, and llmrun does not read it.
        "RAY_enable_metrics_collection": "0",
        # The same for its dashboard's process, at a fixed port, even without a dashboard. There is no other switch.
        "DASHBOARD_METRIC_PORT": "-1",
        # Ray's default of 15 lets any other process of the machine delay engines and the ingress.
        "RAY_worker_niceness": "0",
        **os.environ,
        "LLMRUN_HOME": str(settings.root),
        # No process of the cluster imports from the folder in which somebody typed `llmrun`.
        "PYTHONSAFEPATH": "1",
        "RAY_ADDRESS": ray_address,
        # Start workers on demand only: each takes 80 MiB.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_preload_python_modules": PRELOADED_MODULES,
    }
    if ray_address.rpartition(":")[0] in LOOPBACK:
        # Without this Ray looks for an address that other machines can reach, and listens on it.
        env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if "RAY_AUTH_MODE" not in env:
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    return env


def join(settings: Settings, listening: Listening) -> str:
    """Start llmrun on the Ray cluster at `RAY_ADDRESS`; return the ingress's URL. Raises ClusterError."""
    settings.make_home()
    log = _make_logs(settings) / "boot.log"
    listening.tls()
    run_bootstrap("start", dict(os.environ), listening.arguments(), log)
    cluster = ClusterFile(listening.url, os.environ["RAY_ADDRESS"], tls_cert=listening.tls_cert)
    cluster.write(settings.cluster_file)
    return cluster.url


def restart(settings: Settings) -> str:
    """Replace control and the ingresses of this home's cluster; return its URL. Raises ClusterError."""
    cluster = ClusterFile.read(settings.cluster_file)
    if not cluster or (cluster.pid and not _find_parent(cluster.pid)):
        raise ClusterError(f"no cluster is running in {settings.root}. Start one with `llmrun up`")
    joined = {**os.environ, "RAY_ADDRESS": cluster.ray_address}
    env = _environment(settings, cluster.ray_address) if cluster.pid else joined
    run_bootstrap("restart", env, [], _logs(settings) / "restart.log", RESTART_TIMEOUT_S)
    return cluster.url


def down(settings: Settings, on_waiting: Callable[[int], None] = lambda requests: None, *, now: bool = False) -> bool:
    """Stop this home's cluster; return False if none is running.

    Waits for requests in flight for LLMRUN_DRAIN_TIMEOUT, unless `now`; calls `on_waiting` with their number. Raises
    ClusterError if the cluster does not stop.
    """
    cluster = ClusterFile.read(settings.cluster_file)
    if not cluster:
        return False
    if not cluster.pid:
        env = {**os.environ, "RAY_ADDRESS": cluster.ray_address}
        timeout = STOP_TIMEOUT_S + settings.drain_timeout
        log = _logs(settings) / "boot.log"
        run_bootstrap("stop", env, ["--now"] if now else [], log, timeout, on_waiting)
        settings.cluster_file.unlink(missing_ok=True)
        return True
    if parent := _find_parent(cluster.pid):
        _stop_parent(settings, parent, on_waiting, now=now)
    else:
        # The parent was killed; Ray's processes and engines may still run.
        end_processes(Path(cluster.temp), settings.root)
        settings.cluster_file.unlink(missing_ok=True)
    return True


def _stop_parent(settings: Settings, parent: psutil.Process, on_waiting: Callable[[int], None], *, now: bool) -> None:
    """Signal the parent and wait until it exits. Raises ClusterError."""
    # Two different signals: a second SIGTERM could arrive as one with the first.
    for number in (signal.SIGTERM, signal.SIGINT) if now else (signal.SIGTERM,):
        parent.send_signal(number)
    progress = waiting_file(settings)
    # It counts from the last sign of a drain, whose timeout is a setting of the parent.
    deadline = time.monotonic() + 4 * END_TIMEOUT_S
    while True:
        try:
            parent.wait(POLL_S)
            return
        except psutil.TimeoutExpired:
            pass
        with contextlib.suppress(OSError, ValueError):
            if time.time() - progress.stat().st_mtime < END_TIMEOUT_S:
                on_waiting(int(progress.read_text()))
                deadline = time.monotonic() + 4 * END_TIMEOUT_S
        if time.monotonic() > deadline:
            raise ClusterError(f"process {parent.pid} did not exit within {4 * END_TIMEOUT_S} s: kill it")


def waiting_file(settings: Settings) -> Path:
    """The file with the number of requests that a stopping cluster waits for."""
    return settings.root / "stopping"


def ray_failure(log: Path) -> str:
    """Why Ray exited, from the output of `ray start --block`, like `raylet [exit code=-9]`."""
    try:
        text = COLOUR.sub("", log.read_text(errors="replace"))
    except OSError:
        text = ""
    processes = re.findall(r"\S+ \[exit code=-?\d+\]", text)
    return f"a process of Ray exited: {', '.join(processes)}" if processes else f"Ray exited: see {log}"


def _log(text: str) -> None:
    """Write to the standard output, which is `logs/cluster.log` in the background."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _find_parent(pid: int) -> psutil.Process | None:
    """The process with that ID if it is a cluster's parent: the ID may belong to another process by now."""
    try:
        process = psutil.Process(pid)
        return process if "llmrun_runtime.cluster.local" in process.cmdline()[1:4] else None
    except psutil.NoSuchProcess:
        return None


def _logs(settings: Settings) -> Path:
    return settings.root / "logs"


def _make_logs(settings: Settings) -> Path:
    logs = _logs(settings)
    logs.mkdir(exist_ok=True)
    return logs


def free_ports(host: str, count: int) -> list[int]:
    """Return free ports that the kernel gives to nobody who asks for any port. Raises ClusterError if there are none.

    Ray binds them seconds later. Its own processes take dozens of the kernel's ports meanwhile, and a Ray whose port is
    taken ends.
    """
    first = int(EPHEMERAL_PORTS.read_text().split()[0])
    candidates = random.sample(range(LOWEST_PORT, first), min(200, first - LOWEST_PORT)) if first > LOWEST_PORT else []
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in (*candidates, *[0] * count):  # 0: the kernel's choice, if its range leaves no others
            with contextlib.suppress(OSError):
                ports.append(int(stack.enter_context(socket.create_server((host, port))).getsockname()[1]))
            if len(ports) == count:
                return ports
    raise ClusterError(f"no free port on {host}: check that it is an address of this machine")


def lock_home(settings: Settings) -> IO[str]:
    """Allow one parent per home. Raises ClusterError if there is one already."""
    settings.make_home()
    lock = (settings.root / "up.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ClusterError(
            f"a cluster is already running in {settings.root}: {settings.resolved_url()}. To apply new settings or a "
            f"new release, run `llmrun restart`"
        ) from None
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
    """Run an action. A local cluster's `up` returns when the cluster stops.

    Prints events: `{"ready": URL}`, `{"waiting": REQUESTS}`, `{"stopped": BOOL}`, `{"error": TEXT}`; in the
    foreground, text for people.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["up", "restart", "down"])
    Listening.add_arguments(parser)
    parser.add_argument("--node-ip", default="127.0.0.1")
    parser.add_argument("--detach", action="store_true", help="print events; log to a file once ready")
    parser.add_argument("--now", action="store_true", help="down: end requests in flight")
    args = parser.parse_args()
    settings = Settings()
    for_people = args.action == "up" and not args.detach
    try:
        if args.action == "down":
            _emit({"stopped": down(settings, lambda requests: _emit({"waiting": requests}), now=args.now)})
            return 0
        if args.action == "restart":
            _emit({"ready": restart(settings)})
            return 0
        if os.environ.get("RAY_ADDRESS"):
            _report_ready(join(settings, Listening.of(args)), for_people)
            return 0
        with lock_home(settings):
            cluster = LocalCluster(settings, Listening.of(args), args.node_ip)
            try:
                cluster.start()
                _report_ready(cluster.url, for_people)
                if args.detach:
                    _redirect_output(settings.root / "logs" / "cluster.log")
                cluster.run(lambda requests: _report_waiting(settings, requests, for_people=for_people))
                return 0
            finally:
                cluster.end()
                waiting_file(settings).unlink(missing_ok=True)
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


def _report_waiting(settings: Settings, requests: int, *, for_people: bool) -> None:
    if for_people:
        print(f"Waiting for {requests} requests in flight; press Ctrl-C again to cut them", flush=True)
    with contextlib.suppress(OSError):  # a full disk
        waiting_file(settings).write_text(str(requests))


if __name__ == "__main__":
    sys.exit(main())
