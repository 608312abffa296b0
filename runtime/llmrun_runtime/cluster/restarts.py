"""Decides whether a local cluster that has stopped by itself is started again."""

from __future__ import annotations

from collections import deque

PAUSES_S = (1.0, 5.0, 15.0)
WINDOW_S = 600.0


class RestartPolicy:
    """At most one restart per pause in PAUSES_S within WINDOW_S. Times are in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._stopped: deque[float] = deque(maxlen=len(PAUSES_S) + 1)

    def pause(self, now: float) -> float | None:
        """Record that the cluster stopped; return the seconds until the restart, None if there is none."""
        self._stopped.append(now)
        recent = sum(now - stopped < WINDOW_S for stopped in self._stopped)
        return PAUSES_S[recent - 1] if recent <= len(PAUSES_S) else None
