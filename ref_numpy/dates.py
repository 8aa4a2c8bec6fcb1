"""Dates as people write them, and as ISO 8601 does: pairs for an encoder-decoder to learn from.

    3rd of March, 1987 -> 1987-03-03      Tue, Mar 3 1987 -> 1987-03-03      3.3.87 -> 1987-03-03

Each way of writing means one day: a point stands after the day, a slash after the month, and a year of two
digits is one from 1950 to 2049. Nothing here depends on the language of the system.
"""

from datetime import date

from ref_numpy.rng import DATA, Key, uniform

_FIRST, _LAST = date(1900, 1, 1).toordinal(), date(2099, 12, 31).toordinal()
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FORMATS = (
    "{th} of {month}, {year}",
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "{month} {th} {year}",
    "{mon} {day} {year}",
    "{day}-{mon}-{year}",
    "{weekday}, {day} {month} {year}",
    "{wd}, {mon} {day} {year}",
    "{day}.{number}.{year}",
    "{number}/{day}/{year}",
    "{year}/{number:02}/{day:02}",
)
_SHORT_YEAR = range(1950, 2050)
_HELD_OUT = 10  # one day in so many


def _ordinal(day: int) -> str:
    ending = "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def written(day: date, form: int, short_year: bool, lower: bool) -> str:
    """A day in one of the ways to write it."""
    month, weekday = _MONTHS[day.month - 1], _WEEKDAYS[day.weekday()]
    text = _FORMATS[form].format(
        day=day.day,
        th=_ordinal(day.day),
        number=day.month,
        month=month,
        mon=month[:3],
        weekday=weekday,
        wd=weekday[:3],
        year=f"{day.year % 100:02}" if short_year else day.year,
    )
    return text.lower() if lower else text


def date_pairs(count: int = 20_000, seed: int = 0) -> tuple[list[str], list[str]]:
    """Lines to train on and held-out ones, "source TAB target" each; count in all.

    Every tenth day of the calendar is held out: it is in no line of the others, however it is written.
    """
    training, held_out = [], []
    draws = uniform(Key(seed, DATA), 4 * count).reshape(count, 4)
    for u_day, u_form, u_year, u_case in draws.tolist():
        day = date.fromordinal(_FIRST + int(u_day * (_LAST - _FIRST + 1)))
        form = int(u_form * len(_FORMATS))
        # A year comes first in four digits only: 87/03/03 could be many things.
        short = u_year < 0.2 and day.year in _SHORT_YEAR and not _FORMATS[form].startswith("{year}")
        line = f"{written(day, form, short, u_case < 0.2)}\t{day.isoformat()}"
        (training if day.toordinal() % _HELD_OUT else held_out).append(line)
    return training, held_out
