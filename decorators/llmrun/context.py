"""What a hook learns of a request beside its body."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestContext:
    """Where a request was sent, and by whom."""

    path: str
    """Like `/v1/chat/completions`."""
    key: str = ""
    """The name of the API key; "" if the endpoint needs none."""
    adapter: str = ""
    """The name of the adapter that the request is for; "" for the model itself."""
    form: bool = False
    """Whether the body is a form, as for audio: `request` then has its fields, as texts, without the files."""
