"""Who may come in: the key of a request, and what it may ask for. Pure: table and headers in, key or Refusal out."""

from __future__ import annotations

from llmrun.lora import split_revision
from llmrun.wire import KeyInfo
from llmrun_runtime.asgi import Scope
from llmrun_runtime.ingress.errors import NOT_READY, HTTPError
from llmrun_runtime.wire.routing_table import ModelRoute, Table, digest_of

BEARER = "bearer "
ADMIN = KeyInfo(name="admin")


def find_key(table: Table, scope: Scope, now: float, *, required: bool) -> KeyInfo | None:
    """The caller's key. Raises Refusal (401).

    1. As long as there is no key at all, and none is `required`, everybody may come in.
    2. Else a key comes as OpenAI's clients send it (`Authorization: Bearer …`), or as Anthropic's (`x-api-key`).
    3. It must be one that exists and has not expired. The admin key may everything.
    """
    # 1.
    if not table.keys and not required:
        return None
    # 2.
    headers = dict(scope["headers"])
    said = headers.get(b"authorization", b"").decode("latin-1")
    given = said[len(BEARER) :] if said.lower().startswith(BEARER) else headers.get(b"x-api-key", b"").decode("latin-1")
    if not given.strip():
        text = "no API key: send `Authorization: Bearer sk-llmrun-…`; `llmrun key create NAME` makes one"
        raise HTTPError(401, text, "missing_api_key", "authentication_error")
    # 3.
    digest = digest_of(given.strip())
    key = ADMIN if digest == table.admin else table.keys.get(digest)
    if key is None:
        text = "wrong API key: it was never made, or it has been revoked; `llmrun key list` shows those that there are"
        raise HTTPError(401, text, "invalid_api_key", "authentication_error")
    if key.expires and key.expires <= now:
        text = f"the API key {key.name} has expired: `llmrun key create` makes another"
        raise HTTPError(401, text, "expired_api_key", "authentication_error")
    return key


def may_see(key: KeyInfo | None, model: ModelRoute, adapter: str = "") -> bool:
    """Whether that key reaches that model, or that adapter of it.

    A key for a model is for all its adapters, and one for an adapter for all its revisions.
    """
    if key is None or not key.models:
        return True
    adapter, _ = split_revision(adapter)
    return any(name in key.models or (adapter and f"{name}:{adapter}" in key.models) for name in model.names)


def check_seen(key: KeyInfo | None, model: ModelRoute, adapter: str = "") -> None:
    """Raises Refusal if the key does not reach the model, or the adapter."""
    if key and not may_see(key, model, adapter):
        asked = f"{model.name}:{adapter}" if adapter else model.name
        text = f"the key {key.name} is not for {asked}: it is for {', '.join(key.models)}"
        raise HTTPError(403, text, "model_not_allowed", "permission_error", param="model")


def check_awake(key: KeyInfo | None, model: ModelRoute) -> None:
    """Raises Refusal if the model would have to wake for a key that does not wake any."""
    if key and not key.wake and not model.replicas:
        text = f"{model.name} is {model.state}, and the key {key.name} does not wake models (--no-wake)"
        raise HTTPError(503, text, NOT_READY, "service_unavailable")
