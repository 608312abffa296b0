"""When a model is kept warm by the clock: `Mon-Fri 08:00-18:00 Europe/Berlin`. Pure; the time is an argument."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
FORM = re.compile(r"(?:(\w{3})(?:-(\w{3}))? +)?(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})(?: +(\S+))?")
EXAMPLE = "write it like 'Mon-Fri 08:00-18:00 Europe/Berlin' (days and zone may be left out: every day, UTC)"
DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class ScheduleWindow:
    """Some days of the week, from one minute of the day to another (past midnight if that is the earlier one)."""

    days: frozenset[int]
    """0 is Monday: the day on which the window begins."""
    begin: int
    end: int
    zone: ZoneInfo

    def covers(self, now: float) -> bool:
        """Whether it is open at `now` (unix time), by the clocks of its zone."""
        there = datetime.fromtimestamp(now, self.zone)
        minute = there.hour * 60 + there.minute
        if self.begin < self.end:
            return there.weekday() in self.days and self.begin <= minute < self.end
        yesterday = (there - timedelta(days=1)).weekday()
        return (there.weekday() in self.days and minute >= self.begin) or (yesterday in self.days and minute < self.end)


@functools.lru_cache(maxsize=256)
def parse_window(text: str) -> ScheduleWindow:
    """Read one window. Raises ValueError, saying how to write it. (Kept: the scaler asks four times a second.)"""
    match = FORM.fullmatch(text.strip())
    if not match:
        raise ValueError(f"schedule={text!r}: {EXAMPLE}")
    first, last, *clock, zone = match.groups()
    begin, end = (int(clock[i]) * 60 + int(clock[i + 1]) for i in (0, 2))
    if max(begin, end) > DAY_MINUTES or int(clock[1]) > 59 or int(clock[3]) > 59 or begin == end:
        raise ValueError(f"schedule={text!r}: two different times from 00:00 to 24:00; {EXAMPLE}")
    for day in (first, last):
        if day and day.lower() not in DAYS:
            raise ValueError(f"schedule={text!r}: {day!r} is no day of Mon, Tue, Wed, Thu, Fri, Sat, Sun")
    start = DAYS.index(first.lower()) if first else 0
    stop = DAYS.index(last.lower()) if last else start if first else 6
    days = frozenset((start + n) % 7 for n in range((stop - start) % 7 + 1))
    try:
        where = ZoneInfo(zone or "UTC")
    except (KeyError, ValueError, OSError):
        raise ValueError(f"schedule={text!r}: there is no time zone {zone!r}; take one like Europe/Berlin") from None
    return ScheduleWindow(days, begin, end, where)
