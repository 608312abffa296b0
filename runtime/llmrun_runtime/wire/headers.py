"""Headers and paths between the ingress, a replica and the shim in its engine."""

from __future__ import annotations

import hmac

TOKEN_HEADER = "x-llmrun-token"
# Sent with the token: the name of the request's API key, and a mark for requests that must not keep the model warm.
KEY_HEADER = "x-llmrun-key"
PROBE_HEADER = "x-llmrun-probe"
# The adapter to use: its name and its pin, separated by a space.
ADAPTER_HEADER = "x-llmrun-adapter"
# To control: the address of the ingress's client.
CLIENT_HEADER = "x-llmrun-client"
STATE_PATH = "/_llmrun/state"
# Its parameter, and that of LEAVE_PATH: `?since=NUMBER` leaves out counts that have not changed after that response.
SINCE = "since"
# The replica asks the engine for permission to stop. The response is the engine's state. If nothing is in flight, the
# engine then rejects all requests with 503 and GONE_HEADER, which tells the ingress to try another replica.
LEAVE_PATH = "/_llmrun/leave"
GONE_HEADER = "x-llmrun-gone"
# GONE_HEADER's value if the engine died while it ran the request, which must not reach another one.
DIED = "died"
# Before the path of a request with which the replica checks that the engine still produces output: without hooks, and
# counted nowhere. The ingress forwards only an engine's own paths, so no client can use it.
PROBE_PREFIX = "/_llmrun/probe"


def metrics_credential(admin_digest: str) -> str:
    """Return the `Authorization` with which an ingress, which knows this digest, asks control for metrics."""
    return f"Bearer {hmac.new(admin_digest.encode(), b'metrics', 'sha256').hexdigest()}"
