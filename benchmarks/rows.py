"""What benchmarks tell: rows of ours beside a peer's, in which a ratio above 1 says that ours is ahead."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from torch_impl.training.files import replace_file

OURS = ("torch_impl", "ref_numpy")
"""What the names of our sides begin with."""

_LESS_IS_BETTER = ("s", "MiB", "GiB", "nats/token")


def row(
    name: str, ours: float | None, peer: float | None, unit: str, ratio: float | None = None
) -> dict[str, Any]:
    """A row. A ratio is given where it is not that of the two numbers, as the median of several is not.

    None is a number that there is not, or that is not finite, and a ratio that is not defined: of or to one
    of these, or nothing.
    """
    ours, peer = _finite(ours), _finite(peer)
    if ratio is None and ours and peer:
        ratio = peer / ours if unit in _LESS_IS_BETTER else ours / peer
    return {"name": name, "ours": ours, "peer": peer, "ratio": _finite(ratio), "unit": unit}


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def write_rows(path: str, rows: Sequence[dict]) -> None:
    """Into the file that --json names, if it names one; without any, as when a benchmark was stopped before
    its first, an earlier file stays. Raises OSError where it cannot be written."""
    if path and rows:
        replace_file(Path(path), json.dumps(rows, indent=1, allow_nan=False).encode("utf-8"))


def table(rows: Sequence[dict]) -> str:
    width = max((len(each["name"]) for each in rows), default=0)
    return "\n".join(line(each, width) for each in rows)


def line(each: dict, width: int) -> str:
    """A row for the terminal, its name as wide as the widest; a dash is what there is not."""
    ours, peer = ("–" if each[side] is None else f"{each[side]:.3f}" for side in ("ours", "peer"))
    ratio = "–" if each["ratio"] is None else f"{each['ratio']:.3f}x"
    return f"{each['name']:{width}} {ours:>10} {peer:>10} {each['unit']:10} {ratio:>7}"


@dataclass(frozen=True)
class Measured:
    """What came out for a side at a shape."""

    tokens: int  # of a step
    seconds: list[float]  # of a step, by turns
    flops: float = 0.0  # of a token, as the benchmark counts them
    figures: dict[str, tuple[float, str]] = field(default_factory=dict)  # what else, and its unit

    @property
    def speed(self) -> float:
        """Tokens per second, of the turn in the middle."""
        return self.tokens / median(self.seconds)

    @property
    def flop_speed(self) -> float:
        """FLOP/s."""
        return self.flops * self.speed

    def ratio(self, peer: "Measured") -> float:
        """How many times as fast as a peer: the median of the turns' ratios."""
        return median(theirs / mine for mine, theirs in zip(self.seconds, peer.seconds, strict=True))


def paired(results: dict[str, dict[str, Measured]]) -> list[dict]:
    """Rows of each of our sides beside each peer, shape by shape: the speed, and what else both have."""
    rows = []
    for shape, sides in results.items():
        for mine, peer in product(sides, sides):
            if not mine.startswith(OURS) or peer.startswith(OURS):
                continue
            name, ours, theirs = f"{shape}: {mine} beside {peer}", sides[mine], sides[peer]
            rows.append(row(name, ours.speed, theirs.speed, "tokens/s", ours.ratio(theirs)))
            rows += [
                row(f"{name}, {what}", number, theirs.figures[what][0], unit)
                for what, (number, unit) in ours.figures.items()
            ]
    return rows
