"""A sliding one-minute sum with one-second resolution, for limits per minute. Pure; the clock is an argument."""

from __future__ import annotations

from collections import deque

WINDOW_S = 60


class RateWindow:
    """Amounts by the second in which they were added."""

    def __init__(self) -> None:
        self._amounts: deque[tuple[int, int]] = deque()
        self._total = 0

    def add(self, now: float, amount: int = 1) -> None:
        """Add an amount."""
        self._trim(now)
        second = int(now)
        if self._amounts and self._amounts[-1][0] == second:
            second, previous = self._amounts.pop()
            self._amounts.append((second, previous + amount))
        else:
            self._amounts.append((second, amount))
        self._total += amount

    def total(self, now: float) -> int:
        """Return the sum over the last minute."""
        self._trim(now)
        return self._total

    def wait(self, now: float, limit: int) -> float:
        """Return the seconds until the sum is below `limit` if nothing is added; 0 if it is below now."""
        remaining = self.total(now)
        if remaining < limit:
            return 0
        for second, amount in self._amounts:
            remaining -= amount
            if remaining < limit:
                return second + WINDOW_S - now
        return WINDOW_S

    def _trim(self, now: float) -> None:
        while self._amounts and self._amounts[0][0] <= int(now) - WINDOW_S:
            self._total -= self._amounts.popleft()[1]
