"""How many of what, in a message: 1 pair, 1,000 pairs."""


def counted(number: int, thing: str) -> str:
    """The number with the thing, of whose plural an s is all that there is."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
