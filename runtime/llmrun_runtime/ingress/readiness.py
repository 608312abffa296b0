"""Whether a load balancer should send requests to this ingress: `GET /ready`."""

from __future__ import annotations

from typing import Any

# Longer than one long poll for the routing table, its timeout and a restart of control take.
CONTROL_TIMEOUT_S = 30.0


class Readiness:
    """What `/ready` reports. Times are in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._heard: float | None = None
        self.draining = False
        self.control_cause = ""
        """Why control cannot work, in its own words; "" if it can, or does not respond at all."""

    def heard(self, now: float) -> None:
        """Record that control has sent the routing table, or that it is unchanged."""
        self._heard = now
        self.control_cause = ""

    def report(self, now: float) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the response body."""
        checks = {
            "routing_table": self._heard is not None,
            "control": self._heard is not None and now - self._heard <= CONTROL_TIMEOUT_S,
            "accepting": not self.draining,
        }
        ready = all(checks.values())
        return 200 if ready else 503, {"status": "ready" if ready else "not_ready", "checks": checks}
