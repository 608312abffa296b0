"""Windows of time during which a model is kept warm: `Mon-Fri 08:00-18:00 Europe/Berlin`. Pure: time is an argument."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
WINDOW = re.compile(r"(?:(\w{3})(?:-(\w{3}))? +)?(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})(?: +(\S+))?")
EXAMPLE = "write it like 'Mon-Fri 08:00-18:00 Europe/Berlin' (days and time zone are optional: every day, UTC)"
DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class ScheduleWindow:
    """A part of some days of the week. It ends on the following day if `end` is before `begin`."""

    days: frozenset[int]
    """The days on which the window begins; 0 is Monday."""
    begin: int
    """Minutes since midnight."""
    end: int
    """Minutes since midnight."""
    zone: ZoneInfo

    def covers(self, now: float) -> bool:
        """Whether `now` (Unix time) is in the window, in local time of its zone."""
        local = datetime.fromtimestamp(now, self.zone)
        minute = local.hour * 60 + local.minute
        if self.begin < self.end:
            return local.weekday() in self.days and self.begin <= minute < self.end
        yesterday = (local - timedelta(days=1)).weekday()
        return (local.weekday() in self.days and minute >= self.begin) or (yesterday in self.days and minute < self.end)


@functools.lru_cache(maxsize=256)  # the autoscaler checks schedules four times per second
def parse_window(text: str) -> ScheduleWindow:
    """Parse one window. Raises ValueError; the message shows the format."""
    match = WINDOW.fullmatch(text.strip())
    if not match:
        raise ValueError(f"schedule={text!r}: {EXAMPLE}")
    first, last, *clock, zone_name = match.groups()
    begin, end = (int(clock[i]) * 60 + int(clock[i + 1]) for i in (0, 2))
    if max(begin, end) > DAY_MINUTES or int(clock[1]) > 59 or int(clock[3]) > 59 or begin == end:
        raise ValueError(f"schedule={text!r}: needs two different times from 00:00 to 24:00; {EXAMPLE}")
    for day in (first, last):
        if day and day.lower() not in DAYS:
            raise ValueError(f"schedule={text!r}: unknown day {day!r}; available: Mon, Tue, Wed, Thu, Fri, Sat, Sun")
    start = DAYS.index(first.lower()) if first else 0
    stop = DAYS.index(last.lower()) if last else start if first else 6
    days = frozenset((start + n) % 7 for n in range((stop - start) % 7 + 1))
    try:
        zone = ZoneInfo(zone_name or "UTC")
    except (KeyError, ValueError, OSError):
        raise ValueError(f"schedule={text!r}: unknown time zone {zone_name!r}; use one like Europe/Berlin") from None
    return ScheduleWindow(days, begin, end, zone)
