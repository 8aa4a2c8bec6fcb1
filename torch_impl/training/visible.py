"""Text from files, models and command lines, so that it can do nothing to a terminal or a page."""

import re

# Controls, which move the cursor, colour, or send keys, and those that turn the direction of text around; not
# line ends and tabs. And halves of surrogate pairs: a path has one for each byte that is no UTF-8.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with every character that is none to be shown spelled out, as \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def in_one_line(text: str) -> str:
    """The visible text with its line ends spelled out as well."""
    return visible(text).replace("\n", "\\n")
