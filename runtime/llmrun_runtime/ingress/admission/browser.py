"""Keeps web pages in a user's browser away from an endpoint that needs no key. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.errors import HTTPError

FORM = "multipart/form-data"


def listed(text: str) -> list[str]:
    """Return the hosts or origins in a comma-separated setting."""
    return [name.strip().rstrip("/") for name in text.split(",") if name.strip()]


def names(text: str) -> frozenset[str]:
    """Return those in lower case, as `check_browser` compares them."""
    return frozenset(name.lower() for name in listed(text))


def check_browser(scope: Scope, hosts: Collection[str], origins: Collection[str]) -> None:
    """Raise HTTPError (403) for a request that a page of another site may have made. For endpoints without keys.

    1. Its `Host` is an IP address, `localhost` or one of `hosts`: a page can make the name of its own site an address
       of this machine (DNS rebinding), and would then be of the same origin.
    2. A POST has no `Origin`, that of this endpoint, or one of `origins` (LLMRUN_CORS_ORIGINS): a browser sends a form,
       or text, to any site, and hides only the response.
    """
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1").lower()
    # 1.
    name = _host_name(host)
    if name and not _is_local_name(name) and name not in hosts:
        raise HTTPError(
            403,
            f"host {name!r} is not allowed: this endpoint needs no API key, so it must be called as localhost or by IP "
            f"address. Create a key, or set LLMRUN_ALLOWED_HOSTS",
            "host_not_allowed",
            "permission_error",
        )
    # 2.
    origin = headers.get(b"origin", b"").decode("latin-1").lower()
    allowed = "*" in origins or origin in origins or (origin and urlsplit(origin).netloc == host)
    if scope["method"] == "POST" and origin and not allowed:
        raise HTTPError(
            403,
            f"origin {origin!r} is not allowed: this endpoint needs no API key. Create a key, or set "
            f"LLMRUN_CORS_ORIGINS",
            "origin_not_allowed",
            "permission_error",
        )


def check_content_type(scope: Scope) -> None:
    """Raise HTTPError (415) for a body that no engine accepts, before it wakes a model."""
    value = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    kind = value.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json") and kind != FORM:
        shown = f"content type {kind!r}" if kind else "a body without Content-Type"
        message = f"{shown} is not supported: send `Content-Type: application/json`"
        raise HTTPError(415, message, "unsupported_media_type")


def _host_name(host: str) -> str:
    """Return a `Host` header's name without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_local_name(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
