"""Decides which key a command sends to which server.

1. A key that the environment names (`LLMRUN_ADMIN_KEY`, `LLMRUN_API_KEY`) goes to `LLMRUN_URL`.
2. `admin.key` goes only to the cluster that runs from the same home, after it has proved that it is that one: any user
   of the machine may listen on its port while it does not run.
3. No key goes over `http://` to another machine, unless `LLMRUN_INSECURE` is set.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Generator

import httpx

from llmrun.errors import ControlError
from llmrun.identity import CHALLENGE_HEADER, PROOF_HEADER, is_proof
from llmrun.settings import LOOPBACK, Settings

PROOF_TIMEOUT_S = 10
DEFAULT_PORTS = {"http": 80, "https": 443}


def admin_credentials(settings: Settings) -> httpx.Auth | None:
    """Return what authenticates requests to control; None if there is no key for this URL. Raises ControlError."""
    url = settings.resolved_url()
    if settings.admin_key:
        return _bearer(settings, url, settings.admin_key, "LLMRUN_ADMIN_KEY")
    key = settings.stored_admin_key() if settings.is_own(url) else ""
    return ProvenCluster(url, key) if key else None


def api_credentials(settings: Settings) -> httpx.Auth | None:
    """Return what authenticates requests to models: the API key, else the admin key. Raises ControlError."""
    if settings.api_key:
        return _bearer(settings, settings.resolved_url(), settings.api_key, "LLMRUN_API_KEY")
    return admin_credentials(settings)


def _bearer(settings: Settings, url: str, key: str, name: str) -> httpx.Auth:
    parsed = httpx.URL(url)
    if parsed.scheme == "http" and parsed.host not in LOOPBACK and not settings.insecure:
        raise ControlError(
            f"{name} is not sent to {url}: it would travel unencrypted. Use https://, or a tunnel "
            f"(`ssh -L 8000:127.0.0.1:8000 HOST`); on a network that you trust, set LLMRUN_INSECURE=1"
        )
    return Bearer(key)


def trusted(settings: Settings) -> ssl.SSLContext | bool:
    """Return what decides whether a certificate is trusted (httpx's `verify`). Raises ControlError.

    1. LLMRUN_CA_FILE.
    2. For the cluster of this home, exactly the certificate that it was given, whatever name that is for.
    3. The public authorities.
    """
    url = settings.resolved_url()
    own = settings.own_certificate() if settings.is_own(url) else ""
    file = settings.ca_file or own
    if not file or not url.startswith("https://"):
        return True
    try:
        context = ssl.create_default_context(cafile=file)
    except OSError as error:  # ssl.SSLError is one
        name = "LLMRUN_CA_FILE" if settings.ca_file else "the cluster's certificate"
        raise ControlError(f"cannot read {name} {file}: {error.strerror or error}. It must be a PEM file") from error
    if not settings.ca_file:
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be an authority's
    return context


class Bearer(httpx.Auth):
    """Sends a key with each request."""

    def __init__(self, key: str) -> None:
        self._header = f"Bearer {key}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the key to the request."""
        request.headers["authorization"] = self._header
        yield request


class ProvenCluster(Bearer):
    """Sends the home's admin key once the server has proved that it is the home's cluster. Raises ControlError."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(key)
        self._url, self._key = httpx.URL(url), key
        self._proven = False

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Challenge the server before the first request."""
        if not self._proven:
            challenge = secrets.token_hex(16)
            response = yield httpx.Request(
                "GET",
                self._url.join("/health"),
                headers={CHALLENGE_HEADER: challenge},
                extensions={"timeout": httpx.Timeout(PROOF_TIMEOUT_S).as_dict()},
            )
            proof = response.headers.get(PROOF_HEADER, "")
            if not is_proof(proof, self._key, challenge, self._url.port or DEFAULT_PORTS.get(self._url.scheme, 0)):
                raise ControlError(
                    f"{self._url} is not the cluster of this LLMRUN_HOME, or one of an earlier release: the admin key "
                    f"was not sent. Start the cluster with `llmrun up`, with --port if another process uses this one"
                )
            self._proven = True
        yield from super().auth_flow(request)
