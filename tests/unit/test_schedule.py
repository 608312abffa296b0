"""The windows of schedules."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from llmrun.schedule import parse_window


def at(text: str, zone: str = "Europe/Berlin") -> float:
    """Return the Unix time of a local time."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("schedule", "when", "covered"),
    [
        ("Mon-Fri 08:00-18:00 Europe/Berlin", "2026-11-23 08:00", True),  # a Monday
        ("Mon-Fri 08:00-18:00 Europe/Berlin", "2026-11-23 07:59", False),
        ("Mon-Fri 08:00-18:00 Europe/Berlin", "2026-11-27 17:59", True),
        ("Mon-Fri 08:00-18:00 Europe/Berlin", "2026-11-27 18:00", False),
        ("Mon-Fri 08:00-18:00 Europe/Berlin", "2026-11-28 12:00", False),
        ("mon-fri 8:00-18:00 Europe/Berlin", "2026-07-06 08:30", True),  # summer time
        ("Fri-Mon 00:00-24:00 Europe/Berlin", "2026-11-22 23:59", True),
        ("Fri-Mon 00:00-24:00 Europe/Berlin", "2026-11-24 00:00", False),
        ("Fri 22:00-06:00 Europe/Berlin", "2026-11-28 05:59", True),
        ("Fri 22:00-06:00 Europe/Berlin", "2026-11-27 05:59", False),
        ("08:00-18:00", "2026-11-23 08:30", False),  # 07:30 in UTC
        ("08:00-18:00", "2026-11-23 09:30", True),
    ],
)
def test_a_window_covers_these_times(schedule: str, when: str, covered: bool) -> None:
    assert parse_window(schedule).covers(at(when)) is covered


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("always", "write it like 'Mon-Fri 08:00-18:00 Europe/Berlin'"),
        ("Mon-Fry 08:00-18:00", "unknown day 'Fry'"),
        ("Mon 08:00-25:00", "two different times from 00:00 to 24:00"),
        ("Mon 08:00-08:00", "two different times"),
        ("Mon 08:00-18:75", "two different times"),
        ("Mon 08:00-18:00 Europe/Bärlin", "unknown time zone 'Europe/Bärlin'"),
    ],
)
def test_an_invalid_window_is_refused_with_the_fix(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_window(text)
