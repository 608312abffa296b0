"""Counts of the last minute, to the second, for limits per minute. Pure: the clock is an argument."""

from __future__ import annotations

from collections import deque

WINDOW_S = 60


class RateWindow:
    """Amounts with the second in which they came."""

    def __init__(self) -> None:
        self._amounts: deque[tuple[int, int]] = deque()
        self._total = 0

    def add(self, now: float, amount: int = 1) -> None:
        """Count so much more."""
        second = int(now)
        if self._amounts and self._amounts[-1][0] == second:
            second, before = self._amounts.pop()
            self._amounts.append((second, before + amount))
        else:
            self._amounts.append((second, amount))
        self._total += amount

    def total(self, now: float) -> int:
        """The sum over the last minute."""
        while self._amounts and self._amounts[0][0] <= int(now) - WINDOW_S:
            self._total -= self._amounts.popleft()[1]
        return self._total

    def wait(self, now: float, limit: int) -> float:
        """Seconds until the sum is below `limit`, if nothing comes; 0 if it is."""
        left = self.total(now)
        if left < limit:
            return 0
        for second, amount in self._amounts:
            left -= amount
            if left < limit:
                return second + WINDOW_S - now
        return WINDOW_S
