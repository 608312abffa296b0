"""Starts, stops, backs up and restores this machine's cluster. The runtime does the work, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

from llmrun.errors import BackupError, ClusterError
from llmrun.settings import DEFAULT_URL, Settings
from llmrun_cli.credentials import trusted

PROBE_TIMEOUT_S = 2
EXIT_TIMEOUT_S = 10
HTTP_PORT = 80  # of a URL without a port


def up_command(
    settings: Settings, host: str, port: int, node_ip: str = "127.0.0.1", *, insecure: bool = False
) -> list[str]:
    """Return the command that runs a cluster in the foreground. Raises ClusterError if the runtime is not installed.

    The settings have the certificate and where the admin API can be reached.
    """
    command = [*_runtime(), "up", "--host", host, "--port", str(port), "--node-ip", node_ip]
    for option, file in (("--tls-cert", settings.tls_cert), ("--tls-key", settings.tls_key)):
        command += [option, str(Path(file).expanduser().absolute())] if file else []
    command += ["--admin-host", settings.admin_host] if settings.admin_host else []
    return [*command, "--insecure"] if insecure else command


def start(command: list[str]) -> str:
    """Run `up_command()` in the background; return the URL once the cluster is ready. Raises ClusterError."""
    process = subprocess.Popen(
        [*command, "--detach"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    for line in process.stdout:
        event = _parse_event(line)
        if "ready" in event:
            return str(event["ready"])
        if "error" in event:
            raise ClusterError(event["error"])
    code = process.wait(EXIT_TIMEOUT_S)
    raise ClusterError(f"the cluster process exited with code {code}: see logs/ in LLMRUN_HOME")


def restart() -> str:
    """Replace control and the ingresses of this home's cluster; return its URL. Raises ClusterError."""
    return str(_run("restart")["ready"])


def stop(on_waiting: Callable[[int], None], *, now: bool = False) -> bool:
    """Stop this home's cluster; return False if none is running. Raises ClusterError.

    Calls `on_waiting` with the number of requests in flight that it waits for. `now`: do not wait.
    """
    return bool(_run("down", *(["--now"] if now else []), on_waiting=on_waiting)["stopped"])


def _run(*args: str, on_waiting: Callable[[int], None] = lambda requests: None) -> dict[str, Any]:
    """Run an action of the runtime to its end; return its last event. Raises ClusterError."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen([*_runtime(), *args], stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                event = _parse_event(line)
                if "waiting" in event:
                    on_waiting(event["waiting"])
                else:
                    result = event or result
        errors.seek(0)
        if not result or "error" in result:
            raise ClusterError(result.get("error") or errors.read().strip()[-500:])
    return result


def back_up(file: Path, *, force: bool) -> dict[str, float]:
    """Write a backup of this home; return the numbers of `models` and `keys`, and when it was `created` (Unix time).

    Raises BackupError.
    """
    return _run_backup("backup", file, force)


def restore(file: Path, *, force: bool) -> dict[str, float]:
    """Restore a backup into this home; return the same as `back_up`. Raises BackupError."""
    return _run_backup("restore", file, force)


def _run_backup(action: str, file: Path, force: bool) -> dict[str, float]:
    command = [*_runtime("backup"), action, *(["--force"] if force else []), "--", str(file)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    event = _parse_event(done.stdout)
    if "created" not in event:
        raise BackupError(event.get("error") or f"{action} failed: {done.stderr.strip()[-500:]}")
    return event


def ensure(settings: Settings, starting: Callable[[str], AbstractContextManager[object]]) -> None:
    """Start a cluster if the URL is this machine's default and nothing listens there.

    `starting(url)` is entered for as long as the start takes. Raises ClusterError.
    """
    if settings.url not in ("", DEFAULT_URL):
        return
    url = settings.resolved_url()
    try:
        httpx.get(f"{url}/health", timeout=PROBE_TIMEOUT_S, trust_env=False, verify=trusted(settings))
    except httpx.ConnectError:
        address = httpx.URL(url)  # the default, or that of this home's previous cluster
        with starting(url):
            start(up_command(settings, address.host, address.port or HTTP_PORT))
    except httpx.HTTPError:
        return  # something listens; the next call reports what is wrong


def _parse_event(line: str) -> dict[str, Any]:
    """Parse an event of `llmrun_runtime.cluster.local`, like `{"ready": URL}`; {} for other output."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _runtime(module: str = "local") -> list[str]:
    """Return the command line of a module of the runtime. Raises ClusterError with install instructions."""
    if not importlib.util.find_spec("ray"):
        raise ClusterError(
            "the cluster runtime is not installed: pip install 'llmrun[runtime,gpu]' (for CPUs see the README). "
            "To use a cluster elsewhere, set LLMRUN_URL."
        )
    return [sys.executable, "-P", "-m", f"llmrun_runtime.cluster.{module}"]
