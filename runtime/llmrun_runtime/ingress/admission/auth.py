"""Authentication and authorization by API keys. Pure: routing table and headers in, a key or HTTPError out."""

from __future__ import annotations

from llmrun.identity import digest_of
from llmrun.lora import split_revision
from llmrun.wire import ADMIN, KeyInfo
from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.errors import NOT_READY, HTTPError
from llmrun_runtime.wire.routing_table import ModelRoute, Table

BEARER = "bearer "
KEY_HEADERS = (b"x-api-key", b"api-key")
ADMIN_HINT = "set LLMRUN_ADMIN_KEY to the content of `admin.key` in the head node's LLMRUN_HOME"


def bearer_token(scope: Scope) -> str | None:
    """Return the token in `Authorization: Bearer …`; None if the header is missing or has another scheme."""
    header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    return header[len(BEARER) :].strip() if header.lower().startswith(BEARER) else None


def authenticate(table: Table, scope: Scope, now: float, *, required: bool) -> KeyInfo | None:
    """Return the request's API key; None if no key is needed. Raises HTTPError (401).

    1. While no key exists, requests need none, unless keys are `required` here, or by the table.
    2. Otherwise the key is sent as OpenAI's clients do (`Authorization: Bearer …`), as Anthropic's (`x-api-key`), or as
       Azure's (`api-key`). Clients that send several keys often do not know that: any valid one will do.
    3. The key must exist, and must not be disabled or expired. The admin key has access to everything.
    4. A viewer's key opens no models.
    """
    # 1.
    if not table.keys and not required and not table.keys_required:
        return None
    # 2.
    secrets = _secrets(scope)
    if not secrets:
        message = "API key is required: send `Authorization: Bearer KEY`. Create one with `llmrun key create NAME`"
        raise HTTPError(401, message, "missing_api_key", "authentication_error")
    # 3.
    keys = [ADMIN if digest == table.admin else table.keys.get(digest) for digest in map(digest_of, secrets)]
    known = [key for key in keys if key]
    if not known:
        raise HTTPError(401, "invalid API key (unknown or revoked)", "invalid_api_key", "authentication_error")
    valid = [key for key in known if not _problem(key, now)]
    key = next((key for key in valid if key.role != "viewer"), (valid or known)[0])
    if problem := _problem(key, now):
        raise problem
    # 4.
    if key.role == "viewer":
        message = f"API key {key.name} is a viewer's: it opens no models. Create one with `llmrun key create NAME`"
        raise HTTPError(403, message, "viewer_key", "permission_error")
    return key


def _secrets(scope: Scope) -> list[str]:
    """Return the keys that the request sends, in all headers for them."""
    headers = dict(scope["headers"])
    others = (headers.get(name, b"").decode("latin-1").strip() for name in KEY_HEADERS)
    return [secret for secret in (bearer_token(scope) or "", *others) if secret]


def _problem(key: KeyInfo, now: float) -> HTTPError | None:
    """Return the error for a key that is not valid now."""
    if key.disabled:
        message = f"API key {key.name} is disabled. An admin can enable it"
        return HTTPError(401, message, "disabled_api_key", "authentication_error")
    if key.expires and key.expires <= now:
        message = f"API key {key.name} has expired or was rotated. Create another one with `llmrun key create NAME`"
        return HTTPError(401, message, "expired_api_key", "authentication_error")
    return None


def is_operator(table: Table, secret: str | None, now: float) -> bool:
    """Whether the secret is the admin key's, or that of a valid key with the role of an admin or a viewer."""
    if secret is None:
        return False
    digest = digest_of(secret)
    key = table.keys.get(digest)
    return digest == table.admin or bool(key and key.role in ("admin", "viewer") and not _problem(key, now))


def check_operator(table: Table, scope: Scope, now: float) -> None:
    """Raise HTTPError (401) without an admin's or a viewer's key: strangers do not keep control busy.

    Control checks it again, and what a viewer may do.
    """
    given = bearer_token(scope)
    if table.admin and not is_operator(table, given, now):
        problem = "an admin key is required" if given is None else "invalid admin key"
        raise HTTPError(401, f"{problem}: {ADMIN_HINT}", "invalid_admin_key", "authentication_error")


def can_access(key: KeyInfo | None, model: ModelRoute, adapter: str = "") -> bool:
    """Whether the key has access to the model, or to one of its adapters.

    A key for a model includes all its adapters; a key for an adapter includes all its revisions.
    """
    if key is None or not key.models:
        return True
    adapter, _ = split_revision(adapter)
    return any(name in key.models or (adapter and f"{name}:{adapter}" in key.models) for name in model.names)


def check_may_wake(key: KeyInfo | None, model: ModelRoute) -> None:
    """Raise HTTPError (503) if the model has no replica and the key must not wake it."""
    if key and not key.wake and not model.replicas:
        message = f"{model.name} is {model.state}, and API key {key.name} cannot wake models (--no-wake)"
        raise HTTPError(503, message, NOT_READY, "service_unavailable")
