"""Access control of the API: every request needs the admin key, or a key with the role of an admin or a viewer."""

from __future__ import annotations

import hmac
import time

from llmrun.wire import CONTROL_ROOT, KeyInfo
from llmrun_runtime.asgi import App, Receive, Scope, Send, send_error
from llmrun_runtime.control.keys import Keys
from llmrun_runtime.wire.headers import metrics_credential

METRICS = "/metrics"  # for ingresses, which have no key; see `metrics_credential`
HINT = "set LLMRUN_ADMIN_KEY to the content of `admin.key` in the head node's LLMRUN_HOME, or to a key with --role"
BEARER = b"bearer "
READS = ("GET", "HEAD")
# What a viewer may read: neither models' definitions, whose `env` may have secrets, nor keys, nor the audit log.
VIEWED = tuple(
    f"{CONTROL_ROOT}/{name}"
    for name in ("status", "logs/", "usage", "cold-starts/", "deploys", "operations/", "weights", "adapters/")
)
_KEY = "llmrun.key"


class Access:
    """ASGI middleware: responds 401 without a key of an admin or a viewer, and 403 to what a viewer may not do."""

    def __init__(self, app: App, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the `Authorization` header, a deploy runs code."""
        if scope["type"] == "http" and scope["path"] == METRICS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, metrics_credential(self._keys.admin_digest).encode()):
                await send_error(send, 401, "ask the ingress for metrics", "authentication_error", "invalid_admin_key")
                return
        elif scope["type"] == "http":
            header: bytes = dict(scope["headers"]).get(b"authorization", b"")
            secret = header[len(BEARER) :].strip() if header.lower().startswith(BEARER) else b""
            key = self._keys.find(secret.decode("latin-1"), time.time()) if secret else None
            if key is None or key.role not in ("admin", "viewer"):
                problem = "invalid admin key" if header else "an admin key is required"
                await send_error(send, 401, f"{problem}: {HINT}", "authentication_error", "invalid_admin_key")
                return
            if key.role == "viewer" and not (scope["method"] in READS and scope["path"].startswith(VIEWED)):
                text = f"key {key.name} is a viewer's: it reads status, logs and usage. This needs an admin's key"
                await send_error(send, 403, text, "permission_error", "admin_required")
                return
            scope[_KEY] = key
        await self._app(scope, receive, send)


def key_of(scope: Scope) -> KeyInfo:
    """Return the key that a request within `Access` was sent with."""
    key: KeyInfo = scope[_KEY]
    return key
