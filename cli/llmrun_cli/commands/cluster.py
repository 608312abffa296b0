"""`llmrun up` and `down`: start and end a cluster on this machine. The runtime does it, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from typing import Annotated

import httpx
import typer

from llmrun.errors import ClusterError
from llmrun.settings import DEFAULT_URL, Settings
from llmrun_cli.terminal import err, note, out

START_TIMEOUT_S = 300
PROBE_TIMEOUT_S = 2


def up(
    host: Annotated[str | None, typer.Option(help="The ingress's address, by default LLMRUN_URL's.")] = None,
    port: Annotated[
        int | None, typer.Option(help="The ingress's port, by default LLMRUN_URL's.", min=1, max=65535)
    ] = None,
    node_ip: Annotated[
        str, typer.Option(help="This machine's address for other nodes of the cluster. Loopback: no other nodes.")
    ] = "127.0.0.1",
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and end the cluster on Ctrl-C.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen at --host though no API key keeps anybody out.")
    ] = False,
) -> None:
    """Start a cluster on this machine (with RAY_ADDRESS: put llmrun on that one).

    What was deployed in this LLMRUN_HOME before is deployed again.
    """
    url = httpx.URL(Settings().url or DEFAULT_URL)
    command = _up_command(host or url.host, port or url.port or 80, node_ip)
    command += ["--insecure"] if insecure else []
    if foreground:
        os.execv(command[0], command)
    out.print(f"llmrun is up at {start(command)}")


def start(command: list[str]) -> str:
    """Start the cluster's parent process in the background; the URL when all of it is ready. Raises ClusterError."""
    with err.status("starting a cluster (Ray, control, ingress)"):
        parent = subprocess.Popen(
            [*command, "--detach"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert parent.stdout
        for line in parent.stdout:
            word, _, rest = line.strip().partition(" ")
            if word == "ready":
                return rest
            if word == "error:":
                raise ClusterError(rest)
    raise ClusterError(f"the cluster's parent process ended with {parent.wait(10)}; see logs/ in LLMRUN_HOME")


def _up_command(host: str, port: int, node_ip: str = "127.0.0.1") -> list[str]:
    base = [_python(), "-m", "llmrun_runtime.cluster.local", "up"]
    return [*base, "--host", host, "--port", str(port), "--node-ip", node_ip]


def ensure(settings: Settings) -> None:
    """Start a cluster if the URL is this machine's default one and nothing listens there."""
    if settings.url not in ("", DEFAULT_URL):
        return
    url = settings.resolved_url()
    try:
        httpx.get(f"{url}/health", timeout=PROBE_TIMEOUT_S, trust_env=False)
    except httpx.ConnectError:
        note(f"nothing listens at {url}: starting a cluster on this machine (`llmrun down` ends it)")
        target = httpx.URL(url)  # the default one, or where a cluster of this home was that is no more
        start(_up_command(target.host, target.port or 80))
    except httpx.HTTPError:
        return  # something listens; the next call says what is wrong with it


def down() -> None:
    """End this machine's cluster, with all that runs on it. What is deployed comes back with `llmrun up`."""
    started = time.monotonic()
    with err.status("ending the cluster"):
        done = subprocess.run(
            [_python(), "-m", "llmrun_runtime.cluster.local", "down"], capture_output=True, text=True, check=False
        )
    word, _, rest = done.stdout.strip().partition(" ")
    if word == "ended":
        out.print(f"the cluster has ended ({time.monotonic() - started:.0f} s)")
    elif word == "none":
        out.print(f"no cluster of {Settings().root} runs")
    else:
        raise ClusterError(rest or done.stderr.strip()[-500:])


def _python() -> str:
    """The interpreter that has the runtime. Raises ClusterError with the install line."""
    if not importlib.util.find_spec("ray"):
        raise ClusterError(
            "a cluster needs more than the light install: pip install 'llmrun[runtime,gpu]' (for CPUs see the README); "
            "to use a cluster elsewhere, set LLMRUN_URL"
        )
    return sys.executable
