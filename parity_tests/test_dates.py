"""The dates: what is written can be read in one way only, and nothing held out is trained on."""

from datetime import date

import pytest

from ref_numpy.dates import date_pairs, written


@pytest.mark.parametrize(
    ("form", "short_year", "lower", "text"),
    [
        (0, False, False, "3rd of March, 1987"),
        (1, False, True, "3 march 1987"),
        (4, True, False, "Mar 3 87"),
        (6, False, False, "Tuesday, 3 March 1987"),
        (8, True, False, "3.3.87"),
        (9, False, False, "3/3/1987"),
        (10, False, False, "1987/03/03"),
    ],
)
def test_ways_of_writing(form, short_year, lower, text):
    assert written(date(1987, 3, 3), form, short_year, lower) == text


@pytest.mark.parametrize(
    ("day", "text"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (22, "22nd")],
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


def test_the_seed_decides():
    assert date_pairs(50, 1) == date_pairs(50, 1) != date_pairs(50, 2)
