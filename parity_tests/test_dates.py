"""The dates: what is written can be read in one way only, and nothing held out is trained on."""

from datetime import date, timedelta
from itertools import chain

import numpy as np
import pytest

from ref_numpy import dates
from ref_numpy.dates import date_pairs, written


@pytest.mark.parametrize(
    ("form", "short_year", "lower", "text"),
    [
        (0, False, False, "3rd of March, 1987"),
        (1, False, True, "3 march 1987"),
        (2, False, False, "March 3, 1987"),
        (3, False, False, "March 3rd 1987"),
        (4, True, False, "Mar 3 87"),
        (5, False, False, "3-Mar-1987"),
        (6, False, False, "Tuesday, 3 March 1987"),
        (7, False, False, "Tue, Mar 3 1987"),
        (8, True, False, "3.3.87"),
        (9, False, False, "3/3/1987"),
        (10, False, False, "1987/03/03"),
    ],
)
def test_ways_of_writing(form, short_year, lower, text):
    assert written(date(1987, 3, 3), form, short_year, lower) == text


@pytest.mark.parametrize(
    ("day", "text"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th"), (22, "22nd")],
)
def test_ordinals(day, text):
    assert written(date(2000, 1, day), 0, False, False) == f"{text} of January, 2000"


def test_a_source_has_one_target_and_no_day_is_on_both_sides():
    training, held_out = date_pairs()
    assert len(training) + len(held_out) == 20_000 and 1800 < len(held_out) < 2200
    meaning: dict[str, str] = {}
    for line in training + held_out:
        source, target = line.split("\t")
        assert meaning.setdefault(source, target) == target
        assert date.fromisoformat(target).isoformat() == target
    days = [{line.split("\t")[1] for line in lines} for lines in (training, held_out)]
    assert not days[0] & days[1]


def test_every_month_and_weekday_has_its_name():
    year = [date(2001, 1, 1) + timedelta(n) for n in range(365)]
    names = {written(day, 6, False, False) for day in year}
    assert names == {f"{day:%A}, {day.day} {day:%B} 2001" for day in year}


def drawn(monkeypatch, *uniforms: float) -> str:
    """The only line, where these four numbers are drawn: for the day, the form, a short year, lower case."""
    monkeypatch.setattr(dates, "uniform", lambda key, n: np.array(uniforms))
    (line,) = chain(*date_pairs(1))
    return line


def test_what_the_random_numbers_decide(monkeypatch):
    last = 1 - 2.0**-53
    assert drawn(monkeypatch, 0, 0, 0, 0) == "1st of january, 1900\t1900-01-01"
    assert drawn(monkeypatch, last, last, 0, last) == "2099/12/31\t2099-12-31"
    assert drawn(monkeypatch, 0.5, 0.1, 0.19, 0.19) == "1 january 00\t2000-01-01"
    for rather_not in (0.2, 0.3):
        line = drawn(monkeypatch, 0.5, 0.1, rather_not, rather_not)
        assert line == "1 January 2000\t2000-01-01"


def test_years_of_two_digits_are_those_from_1950_to_2049():
    lines = [line.split("\t") for line in chain(*date_pairs())]
    short = {target[:4] for source, target in lines if target[:4] not in source}
    assert short == {str(year) for year in range(1950, 2050)}


def test_the_seed_decides():
    assert date_pairs(50, 1) == date_pairs(50, 1) != date_pairs(50, 2)
    assert date_pairs(50) == date_pairs(50, 0)
