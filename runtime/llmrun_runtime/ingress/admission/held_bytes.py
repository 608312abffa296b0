"""Limits the bytes of request bodies that one ingress holds, in total and by key."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Self

from llmrun_runtime.ingress.errors import HTTPError

RETRY_AFTER_S = 5


class HeldBytes:
    """The bytes of all bodies that are read or that a retry may need. One key may hold half of `maximum`."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.total = 0
        self.by_key: Counter[str] = Counter()

    def body(self, key: str) -> HeldBody:
        """Return an empty body of a request with this key; "" without one."""
        return HeldBody(self, key)

    def reserve(self, key: str, size: int) -> None:
        """Count `size` more bytes. Raises HTTPError: 429 above the key's share, 503 above the maximum."""
        share = self.maximum // 2
        if key and self.by_key[key] + size > share:
            message = (
                f"too many bytes of requests are in progress: API key {key} is limited to {share >> 20} MiB of request "
                f"bodies (half of LLMRUN_MAX_HELD_BYTES)"
            )
            raise HTTPError(429, message, "key_bytes_exceeded", "rate_limit_error", retry_after=RETRY_AFTER_S)
        if self.total + size > self.maximum:
            message = (
                f"too many bytes of requests are in progress: the ingress is limited to {self.maximum >> 20} MiB of "
                f"request bodies (LLMRUN_MAX_HELD_BYTES)"
            )
            raise HTTPError(503, message, "ingress_full", "service_unavailable", retry_after=RETRY_AFTER_S)
        self.add(key, size)

    def add(self, key: str, size: int) -> None:
        """Count `size` more bytes, or fewer if it is negative."""
        self.total += size
        self.by_key[key] += size
        if not self.by_key[key]:
            del self.by_key[key]


class HeldBody:
    """A request's body; a context manager that lets it go at the end.

    It is the only reference to the bytes, so that `let_go` frees them while the response streams.
    """

    def __init__(self, held: HeldBytes, key: str) -> None:
        self._held = held
        self._key = key
        self._size = 0
        self.content = b""

    def reserve(self, size: int) -> None:
        """Count bytes that have arrived. Raises HTTPError, see `HeldBytes.reserve`."""
        self._held.reserve(self._key, size)
        self._size += size

    def replace(self, content: bytes) -> None:
        """Hold other bytes instead: those of a body that was read were checked by `reserve`."""
        self._held.add(self._key, len(content) - self._size)
        self._size, self.content = len(content), content

    def let_go(self) -> None:
        """Drop the bytes, and count them no longer."""
        self.replace(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.let_go()
