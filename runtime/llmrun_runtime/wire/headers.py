"""Headers and paths between the ingress, a replica and the shim in its engine."""

from __future__ import annotations

TOKEN_HEADER = "x-llmrun-token"
# Beside the token: whose request it is, by the name of its API key; and that it must not keep the model warm.
KEY_HEADER = "x-llmrun-key"
PROBE_HEADER = "x-llmrun-probe"
# And the adapter that it is for: its name and its pin, with a space between.
ADAPTER_HEADER = "x-llmrun-adapter"
STATE_PATH = "/_llmrun/state"
# The replica asks here whether the engine may end: the answer is its state, and if nothing is in flight it takes no
# request from then on. Who asks it all the same gets 503 with this header, and may ask another replica.
LEAVE_PATH = "/_llmrun/leave"
GONE_HEADER = "x-llmrun-gone"
