"""The pictures of a report: one of everything, and a small one for each row."""

import io
from collections.abc import Sequence

import numpy as np

from parity_tests.report.collect import Row

COLORS = {
    "float64": "tab:green",
    "float32": "tab:blue",
    "tf32": "tab:cyan",
    "bfloat16": "tab:orange",
    "float16": "tab:red",
}
LEAST, MOST = -6.0, 2.0  # decades that are shown; what lies beyond stands at the edge
BINS = 32


def overview(rows: Sequence[Row]) -> bytes:
    """A PNG: for each component and precision the span of its errors, and the bound; the closest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    nearest: dict[str, float] = {}
    for row in rows:
        nearest[row.component] = max(nearest.get(row.component, 0.0), row.units[-1])
    components = sorted(nearest, key=lambda name: nearest[name])
    precisions = [name for name in COLORS if any(row.precision == name for row in rows)]
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(components) + 1.5), layout="constrained")
    axes.axvspan(1, 10**MOST, color="tab:red", alpha=0.12, lw=0)
    axes.axvline(1, color="tab:red", lw=1.5)
    for row in rows:
        lift = 0.22 * ((len(precisions) - 1) / 2 - precisions.index(row.precision))
        place = components.index(row.component) + lift
        low, middle, high, most = np.quantile(within(row.units), [0.05, 0.5, 0.95, 1.0])
        color = COLORS[row.precision]
        axes.plot([low, most], [place, place], color=color, lw=0.8)
        axes.plot([low, high], [place, place], color=color, lw=3, alpha=0.45, solid_capstyle="butt")
        axes.plot([middle], [place], "|", color=color, markersize=6)
        outside = row.units[-1] > 1
        axes.plot(
            [most], [place], "X" if outside else "o", color="tab:red" if outside else color, markersize=4
        )
    for name in precisions:
        question = "the same mathematics" if name == "float64" else "rounding"
        axes.plot([], [], color=COLORS[name], lw=3, label=f"{name}: {question}")
    axes.set_xscale("log")
    axes.set_xlim(10**LEAST / 1.5, 10**MOST)
    axes.set_ylim(-0.7, len(components) - 0.3)
    axes.set_yticks(range(len(components)), components)
    axes.set_xlabel("largest error of a case, in units of what is allowed (1e-6: so much or less)")
    axes.text(1.15, len(components) - 0.55, "not allowed", color="tab:red", va="top", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    return picture.getvalue()


def within(units: np.ndarray) -> np.ndarray:
    """Numbers of units as they are shown: within the decades of the picture."""
    return np.clip(units, 10**LEAST, 10**MOST)


def histogram(row: Row, width: int = 200, height: int = 34) -> str:
    """An SVG: how often which error was seen, from a millionth of the bound to a hundred bounds."""
    counts, edges = np.histogram(np.log10(within(row.units)), BINS, (LEAST, MOST))
    heights = np.sqrt(counts / counts.max()) * (height - 12)  # of the root, for the rare ones to be seen
    x = (edges - LEAST) / (MOST - LEAST) * width
    bound = -LEAST / (MOST - LEAST) * width
    bars = "".join(
        f'<rect x="{left:.1f}" y="{height - 10 - tall:.1f}" width="{width / BINS - 1}" height="{tall:.1f}" '
        f'fill="{"#2a6fb0" if left < bound - 0.1 else "#c62828"}"/>'
        for left, tall in zip(x[:-1], heights, strict=True)
        if tall
    )
    ticks = "".join(
        f'<text x="{(decade - LEAST) / (MOST - LEAST) * width:.1f}" y="{height}" font-size="8" '
        f'text-anchor="{"start" if decade == LEAST else "middle"}" fill="#777">{label}</text>'
        for decade, label in ((-6, "≤1e-6"), (-4, "1e-4"), (-2, "0.01"), (0, "1"))
    )
    line = f'<line x1="{bound}" x2="{bound}" y1="0" y2="{height - 9}" stroke="#c62828" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}" role="img">{bars}{line}{ticks}</svg>'
