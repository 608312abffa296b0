"""From where the admin API can be reached. Pure."""

from __future__ import annotations

import ipaddress

from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.listening import EVERYWHERE

# A proxy on this machine connects from it for clients elsewhere.
FORWARDED = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip"})


def check_admin_access(scope: Scope, admin_host: str) -> None:
    """Raise HTTPError (403) unless the request came from where the admin API can be reached.

    1. Where `admin_host` says: its holder can run code, so the operator opens it, not `--host`.
    2. From this machine, but not through a proxy.
    """
    server, client = _address(scope, "server"), _address(scope, "client")
    # 1.
    if admin_host in EVERYWHERE or (admin_host and admin_host == server):
        return
    # 2.
    is_local = client == server or (bool(client) and ipaddress.ip_address(client).is_loopback)
    if is_local and not any(name in FORWARDED for name, _ in scope["headers"]):
        return
    message = (
        "llmrun's own API can be reached from the cluster's machine only. To open it to others, start the cluster with "
        "--admin-host, or use a tunnel (`ssh -L 8000:127.0.0.1:8000 HOST`)"
    )
    raise HTTPError(403, message, "admin_not_here", "permission_error")


def _address(scope: Scope, end: str) -> str:
    """Return the IP address of one end of the connection, "" if it has none."""
    host = (scope.get(end) or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
