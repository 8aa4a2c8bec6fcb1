"""How many of what, in a message: 1 pair, 1,000 pairs, 1.5 GiB."""


def counted(number: int, thing: str) -> str:
    """The number with the thing, whose plural ends in an s."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def in_bytes(number: int) -> str:
    """A number of bytes, by powers of 1024."""
    return scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def scaled(number: int | float, base: int, units: tuple[str, ...]) -> str:
    """A number with the unit that leaves it below a base."""
    power = 0
    while number >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:,.1f} {units[power]}" if power else f"{number:,.0f} {units[0]}".rstrip()
