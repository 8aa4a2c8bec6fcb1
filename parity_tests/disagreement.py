"""A failure that explains itself: what broke, where, by how much, why perhaps, and how to see it again."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from parity_tests import tolerances
from parity_tests.components import DIFFERENTIABLE
from parity_tests.exchange import NotOffered, scale_of
from parity_tests.snippet import code
from parity_tests.trace import first_parting

if TYPE_CHECKING:
    from parity_tests.parity import Case, Target

Arrays = Mapping[str, np.ndarray]
MANY = 5  # results that a report lists one by one


class Disagreement(AssertionError):
    """A case in which the backend is not what the reference is. The message is made when it is read: while
    Hypothesis looks for the smallest case, nobody reads it."""

    def __init__(
        self, target: "Target", case: "Case", precision: str, got: Arrays, want: Arrays, bounds: Arrays
    ) -> None:
        super().__init__()
        self.target, self.case, self.precision = target, case, precision
        self.got, self.want, self.bounds = got, want, bounds

    @property
    def device(self) -> str:
        return self.target.runs_on(self.case.component, self.precision)

    @property
    def law(self) -> str:
        if self.precision == "float64":
            return "not the same mathematics (float64)"
        return f"not as well rounded as it could be ({self.precision} on {self.device})"

    @cached_property
    def report(self) -> str:
        name = next(name for name in self.want if self._beyond(name).any())
        paragraphs = [
            f"{self.case.component} of {self.target.backend.name}: {self.law}",
            self._worst(name),
            "\n".join(self._overview()),
            self.verdict(name),
        ]
        if (parting := self._parting()) is not None:
            paragraphs.append(parting)
        return "\n".join(paragraphs)

    def __str__(self) -> str:
        return self.report

    @property
    def script(self) -> str:
        """The case in Python."""
        return code(*self.case, self.target.backend.name, self.device, self.precision)

    def _beyond(self, name: str) -> np.ndarray:
        """Which elements are beyond their bound; NaN is, where the reference has a number."""
        return ~((self._apart(name) <= self.bounds[name]) | (self.got[name] == self.want[name]))

    def _apart(self, name: str) -> np.ndarray:
        """The distance of all elements; of truths it is 0 or 1."""
        with np.errstate(invalid="ignore"):
            return np.abs(self.got[name].astype(float) - self.want[name].astype(float))

    def _worst(self, name: str) -> str:
        got, want = self.got[name], self.want[name]
        excess = np.where(self._beyond(name), self._apart(name) - self.bounds[name], -np.inf)
        if want.dtype.kind != "f":
            excess = self._beyond(name)  # of what has to be equal, the first that is not
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), want.shape)
        place = f"{name}[{', '.join(str(int(i)) for i in worst)}]" if worst else name
        if want.dtype.kind != "f":
            return f"  {place} is the first to differ: {got[worst]}, the reference has {want[worst]}"
        apart = float(self._apart(name)[worst])
        bound = float(np.broadcast_to(self.bounds[name], want.shape)[worst])
        return (
            f"  {place} is {got[worst]:.12g}, the reference has {want[worst]:.12g} (in float64); "
            f"{apart:.2e} apart, {bound:.2e} excused"
        )

    def _overview(self) -> list[str]:
        """Each result, if there are not too many: whether it agrees, or how much of it does not."""
        agree = [name for name in self.want if not self._beyond(name).any()]
        off = [name for name in self.want if name not in agree]
        lines = [f"  {name}: {self._extent(name)}" for name in off[:MANY]]
        if off[MANY:]:
            lines.append(f"  and {len(off) - MANY} results more")
        if agree:
            more = f" and {len(agree) - MANY} results more" if agree[MANY:] else ""
            lines.append(f"  agree: {', '.join(agree[:MANY])}{more}")
        return lines

    def _extent(self, name: str) -> str:
        beyond, got, want = self._beyond(name), self.got[name], self.want[name]
        text = f"{int(beyond.sum())} of {beyond.size} elements are off"
        for axis in range(beyond.ndim):
            others = tuple(a for a in range(beyond.ndim) if a != axis)
            hit = np.flatnonzero(beyond.any(axis=others))
            if hit.size < beyond.shape[axis] and hit.size <= 3:
                text += f", all at {', '.join(map(str, hit))} of {beyond.shape[axis]} on axis {axis}"
        if want.dtype.kind != "f":
            return text
        if np.isnan(got).any():
            return f"{text}; {int(np.isnan(got).sum())} are NaN"
        large = np.abs(want) > 1e-3 * np.abs(want).max(initial=0)
        if not got.any():
            return f"{text}; all are 0"
        if large.sum() > 1:
            ratio = got[large] / want[large]
            slack = 1e-6 if self.precision == "float64" else 0.02
            if np.ptp(ratio) <= slack * abs(ratio.mean()) and abs(ratio.mean() - 1) > slack:
                return f"{text}; the whole is {ratio.mean():.6g} times the reference's"
        return text

    def verdict(self, name: str) -> str:
        """Mathematics or rounding: what float64 says."""
        if self.want[name].dtype.kind != "f":
            return "EQUALITY is asked: these are no floating numbers, so it is no matter of rounding."
        if self.precision == "float64":
            return self._verdict_in_float64(name)
        try:
            arguments, dy = self.case.inputs(self.precision)
            run = self.target.backend.run
            exact = run(self.case.component, arguments, dy, "float64", self.target.mathematics_on).named()
        except NotOffered:
            return f"MATHEMATICS OR ROUNDING? {self.target.backend.name} has no float64, which would tell."
        off = {n: float(np.abs(exact[n] - want).max(initial=0)) for n, want in self.want.items()}
        scale = scale_of({"dy": dy, **arguments}, self.want)
        bad = [n for n, error in off.items() if not error <= tolerances.mathematics(self.want[n], scale)]
        if bad:
            return f"MATHEMATICS: in float64, too, {bad[0]} is off, by {off[bad[0]]:.1e}."
        return (
            f"ROUNDING: in float64 the same case agrees, {name} to {off[name]:.0e}. The formula is right;\n"
            f"digits are lost on the way, in a sum kept in {self.precision}, say, or in a difference\n"
            "of large numbers."
        )

    def _verdict_in_float64(self, name: str) -> str:
        differ = self.got[name] != self.want[name]  # infinities that are equal have no difference
        got, want = self.got[name][differ], self.want[name][differ]
        error = float(np.abs(got - want).max(initial=0))
        is_float32 = got.any() and np.array_equal(got, got.astype(np.float32))
        if (
            is_float32
            and not np.array_equal(want, want.astype(np.float32))
            and error < 1e-5 * np.abs(want).max()
        ):
            return (
                "ROUNDING: every number here is one of float32. Something computes in less than the float64\n"
                "that it was given: a .float(), a constant tensor, an autocast."
            )
        size = float(np.abs(self.want[name]).max(initial=0))
        share = f", {error / size:.0e} of the largest" if size else ""
        suspect = "Another formula, mask, axis, constant or term"
        if 1e-9 * size < error < 1e-6 * size:
            suspect += ", or a part of it computed in float32: the size would fit"
        return (
            f"MATHEMATICS: float64 rounds at 1e-16 of a number, and this is {error:.0e}{share}.\n{suspect}."
        )

    def _parting(self) -> str | None:
        """For what is made of parts: the first that differs."""
        has_parts = any(isinstance(value, dict) for value in self.case.arguments.values())
        if not has_parts or self.case.component not in DIFFERENTIABLE:
            return None
        try:
            return first_parting(
                self.target, self.case, [name for name in self.want if self._beyond(name).any()]
            )
        except NotOffered as refusal:
            return f"Its parts were not compared in float64: {refusal}."
