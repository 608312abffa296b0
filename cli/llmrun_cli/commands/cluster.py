"""`llmrun up`, `llmrun restart` and `llmrun down`: start, restart and stop a cluster on this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer

from llmrun.settings import DEFAULT_URL, LOOPBACK, Settings
from llmrun_cli import local_cluster
from llmrun_cli.terminal import err, note, out


def up(
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help="Address to listen on. Defaults to the host of LLMRUN_URL.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="Port to listen on. Defaults to the port of LLMRUN_URL.", min=1, max=65535),
    ] = None,
    node_ip: Annotated[
        str,
        typer.Option(
            metavar="IP", help="This machine's address for other nodes. With a loopback address, no node can join."
        ),
    ] = "127.0.0.1",
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Run in the foreground; Ctrl-C stops the cluster.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on --host without API keys (anyone can connect).")
    ] = False,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Serve https:// with this certificate (PEM). Defaults to LLMRUN_TLS_CERT."),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Key of the certificate (PEM). Defaults to LLMRUN_TLS_KEY."),
    ] = None,
    admin_host: Annotated[
        str | None,
        typer.Option(
            metavar="IP",
            help="Address at which other machines can reach llmrun's own API, which runs code: 0.0.0.0 for all. "
            "Defaults to LLMRUN_ADMIN_HOST, or none.",
        ),
    ] = None,
) -> None:
    """Start a cluster on this machine.

    Restores the models deployed in this LLMRUN_HOME. If RAY_ADDRESS is set, llmrun runs on that Ray cluster instead.
    """
    settings = Settings()
    given = {"tls_cert": tls_cert, "tls_key": tls_key, "admin_host": admin_host}
    settings = settings.model_copy(update={name: str(value) for name, value in given.items() if value is not None})
    url = httpx.URL(settings.url or DEFAULT_URL)
    address = host or url.host, port or url.port or local_cluster.HTTP_PORT
    command = local_cluster.up_command(settings, *address, node_ip, insecure=insecure)
    if foreground:
        os.execv(command[0], command)
    with err.status("Starting a cluster (Ray, control, ingress)"):
        ready_url = local_cluster.start(command)
    out.print(f"llmrun is running at {ready_url}")
    if address[0] not in LOOPBACK and not settings.tls_cert:
        note("Requests from other machines travel unencrypted, their keys, too. Use --tls-cert, or a TLS proxy.")


def restart() -> None:
    """Restart control and the ingresses of the cluster on this machine, without a failed request.

    Applies this command's LLMRUN_* settings and the installed release to them. Engines, replicas and other nodes keep
    running; `llmrun down` and `llmrun up` restart everything.
    """
    started = time.monotonic()
    with err.status("Restarting control and the ingress"):
        url = local_cluster.restart()
    out.print(f"llmrun is running at {url} ({time.monotonic() - started:.0f} s)")


def down(
    now: Annotated[bool, typer.Option("--now", help="Cut the requests in flight instead of waiting for them.")] = False,
) -> None:
    """Stop the cluster on this machine.

    Refuses new requests and waits for those in flight, at most LLMRUN_DRAIN_TIMEOUT. Stops all models; `llmrun up`
    restores them.
    """
    started = time.monotonic()
    with err.status("Stopping the cluster") as status:

        def on_waiting(requests: int) -> None:
            noun = "request" if requests == 1 else "requests"
            status.update(f"Waiting for {requests} {noun} in flight; `llmrun down --now` cuts them")

        stopped = local_cluster.stop(on_waiting, now=now)
    if stopped:
        out.print(f"Cluster stopped ({time.monotonic() - started:.0f} s)")
    else:
        out.print(f"No cluster is running in {Settings().root}.")
