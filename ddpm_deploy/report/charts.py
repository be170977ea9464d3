"""Error against t, and samples that are no pictures as lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ddpm_deploy.arrays import Samples
from ddpm_deploy.report.pictures import amplifying
from ddpm_deploy.report.svg import FAINT, FIRST, SECOND, THIRD, style, to_svg
from ddpm_deploy.report.words import QUANTITY_NAMES, number
from ddpm_deploy.verify.budget import QUANTITIES, ErrorKind, Limit, Quantity
from ddpm_deploy.verify.compare import Comparison, StepErrors
from ddpm_deploy.verify.measures import Measure

POINTS = 600
"""Points a curve keeps; of a longer loop each is the worst of its neighbours."""

LINE_POINTS = 160
"""Points of a sample that are drawn of a row, evenly spread."""

CHANNELS = 4
"""Rows of a sample that are drawn as lines."""

_KINDS: tuple[tuple[ErrorKind, str, str], ...] = (
    ("local", FIRST, "-"),
    ("accumulated", SECOND, "--"),
)

_AXIS: dict[Measure, str] = {
    "max": "largest error / peak",
    "l2": "relative L2 error",
    "cosine": "1 - cosine",
    "psnr": "PSNR in dB",
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing and what it says.

    Attributes:
        heading: What it shows.
        svg: The drawing.
        says: What is to be seen there, with values.
    """

    heading: str
    svg: Markup
    says: str


def error_charts(comparison: Comparison, *, T: int) -> list[list[Chart]]:  # noqa: N803
    """Draws the largest errors, and every other measure that the budget bounds, against t.

    Args:
        comparison: What was found; without a step there is nothing to draw.
        T: Timesteps of the schedule, the width of the axis.

    Returns:
        For each measure a chart each of the output, x_0 and x.
    """
    if not comparison.steps:
        return []
    bounded = {limit.measure for limit in comparison.budget.limits}
    measures = [m for m in get_args(Measure) if m == "max" or m in bounded]
    return [
        [_error_chart(comparison, quantity, measure, T) for quantity in QUANTITIES]
        for measure in measures
    ]


def _error_chart(comparison: Comparison, quantity: Quantity, measure: Measure, T: int) -> Chart:  # noqa: N803
    limits = [
        limit
        for limit in comparison.budget.limits
        if (limit.quantity, limit.measure) == (quantity, measure)
    ]
    says = ". ".join(_said(comparison.steps, quantity, measure, limits)) + "."
    heading = f"{QUANTITY_NAMES[quantity]}: {_AXIS[measure]}"
    with style():
        figure = Figure(figsize=(4.3, 3.0), layout="constrained")
        axes = figure.add_subplot()
        ends = _scale(axes, comparison, measure)
        _draw_curves(axes, comparison.steps, quantity, measure, ends)
        for limit in limits:
            _draw_limit(axes, limit, T, ends, below=_label_below(limit, limits))
        left, right = T - 1 + 0.02 * T, -0.02 * T
        axes.set_xlim(left, right)
        axes.set_xlabel("t")
        axes.set_xticks(sorted({round(i * (T - 1) / 4) for i in range(5)}))
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
        svg = to_svg(
            figure,
            name=f"error-{quantity}-{measure}",
            title=f"{heading}, at each timestep from {T - 1} to 0",
            description=says,
        )
    return Chart(heading=heading, svg=svg, says=says)


def _said(
    steps: Sequence[StepErrors], quantity: Quantity, measure: Measure, limits: Sequence[Limit]
) -> Iterator[str]:
    for kind, _, _ in _KINDS:
        curve = Limit(error=kind, quantity=quantity, measure=measure, bound=0.0)
        worst = curve.worst(steps)
        assert worst is not None, "there is a step"
        value = _plotted(measure, curve.value(worst))
        said = f"{kind.capitalize()}: worst {number(value)} at t = {worst.t}"
        bounds = [number(_plotted(measure, limit.bound)) for limit in limits if limit.error == kind]
        yield said + (f", budget {' and '.join(bounds)}" if bounds else "")


def _plotted(measure: Measure, value: float) -> float:
    """Returns what stands on the axis: a cosine as its distance from 1."""
    return 1 - value if measure == "cosine" else value


def _scale(axes: Axes, comparison: Comparison, measure: Measure) -> tuple[float, float]:
    """Gives an axis the range of all three quantities; returns its least and largest value.

    What is less stands at the one, what is more at the other: 0 on a logarithmic axis, where it has
    a line of its own, and the infinite PSNR of equal samples.
    """
    curves = [
        Limit(error=kind, quantity=quantity, measure=measure, bound=0.0)
        for kind, _, _ in _KINDS
        for quantity in QUANTITIES
    ]
    values = [_plotted(measure, c.value(step)) for c in curves for step in comparison.steps]
    bounds = [
        _plotted(measure, limit.bound)
        for limit in comparison.budget.limits
        if limit.measure == measure
    ]
    shown = [value for value in (*values, *bounds) if math.isfinite(value)]
    if measure == "psnr":
        low, high = min(shown, default=0.0), max(shown, default=100.0)
        axes.set_ylim(low - 3, high + 6)
        return low, high + 5
    positive = [value for value in shown if value > 0]
    low = math.floor(math.log10(min(positive, default=1e-9)))
    high = math.ceil(math.log10(max(positive, default=1.0)) + 0.15)
    zero = any(value <= 0 for value in values)
    low -= zero
    stride = max(1, math.ceil((high - low) / 6))
    ticks = [10.0**e for e in range(low, high + 1) if (high - e) % stride == 0 and e > low - 1]
    if zero:
        ticks = [10.0**low, *(tick for tick in ticks if tick > 10.0**low)]
    axes.set_yscale("log")
    axes.set_ylim(10.0 ** (low - 0.15), 10.0**high)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: "0" if zero and v <= 10.0**low else _power(v))
    )
    return 10.0**low, 10.0**high


def _power(value: float) -> str:
    exponent = str(round(math.log10(value)))
    return "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _draw_curves(
    axes: Axes,
    steps: Sequence[StepErrors],
    quantity: Quantity,
    measure: Measure,
    ends: tuple[float, float],
) -> None:
    for kind, colour, dashes in _KINDS:
        curve = Limit(error=kind, quantity=quantity, measure=measure, bound=0.0)
        points = [(step.t, _plotted(measure, curve.value(step))) for step in thinned(steps, curve)]
        marker = "o" if len(points) <= 30 else ""
        axes.plot(
            [t for t, _ in points],
            np.clip([value for _, value in points], *ends),
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=3.5,
        )


def thinned(steps: Sequence[StepErrors], curve: Limit) -> list[StepErrors]:
    """Returns at most about `POINTS` steps: of each run of neighbours the worst."""
    size = -(-len(steps) // POINTS)
    worst = (curve.worst(steps[i : i + size]) for i in range(0, len(steps), size))
    return [step for step in worst if step is not None]


def _label_below(limit: Limit, limits: Sequence[Limit]) -> bool:
    """Tells whether the other error's line runs close above, where the label would stand."""
    own = _plotted(limit.measure, limit.bound), limit.error == "accumulated"
    others = [
        (_plotted(other.measure, other.bound), other.error == "accumulated")
        for other in limits
        if other.error != limit.error
    ]
    return any(own < other and other[0] < 5 * own[0] for other in others)


def _draw_limit(
    axes: Axes,
    limit: Limit,
    T: int,  # noqa: N803
    ends: tuple[float, float],
    *,
    below: bool,
) -> None:
    colour = next(colour for kind, colour, _ in _KINDS if kind == limit.error)
    bound = _plotted(limit.measure, limit.bound)
    value = float(np.clip(bound, *ends))
    last = T - 1 if limit.last is None else min(limit.last, T - 1)
    axes.hlines(value, limit.first, last, colors=colour, linestyles=":", linewidth=1.3)
    # At the noisy end, where accumulated errors are small yet.
    axes.annotate(
        f"{limit.error} budget {number(bound)}",
        (last, value),
        xytext=(2, -3 if below else 3),
        textcoords="offset points",
        va="top" if below else "bottom",
        fontsize=9,
        color=colour,
    )


def line_chart(wanted: Samples, given: Samples, *, name: str, heading: str) -> Chart:
    """Draws a sample that is no picture on both sides, a panel for each of its first rows.

    Args:
        wanted: float32, (C, ...), the reference's; what follows C is drawn as one line.
        given: The same of the deployed side.
        name: As in `to_svg`.
        heading: What it is.
    """
    w, g = (x.reshape(len(x) if x.ndim > 1 else 1, -1) for x in (wanted, given))
    difference = float(np.abs(g.astype(np.float64) - w).max())
    factor = amplifying(difference, float(np.abs(w).max()))
    says = (
        f"Largest difference {number(difference)}, drawn × {factor:g}; the reference goes from "
        f"{number(float(w.min()))} to {number(float(w.max()))}"
    )
    rows = min(len(w), CHANNELS)
    length = w.shape[1]
    at = np.unique(np.linspace(0, length - 1, min(length, LINE_POINTS)).round().astype(int))
    if rows < len(w):
        says += f"; the first {rows} of {len(w)} rows are drawn"
    if len(at) < length:
        says += f"; {len(at)} of {length} points a row are drawn"
    says += "."
    with style():
        figure = Figure(figsize=(4.3, 0.6 + 1.0 * rows), layout="constrained")
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        marker = "o" if len(at) <= 30 else ""
        for row, axes in enumerate(panels):
            amplified = factor * (g[row, at].astype(np.float64) - w[row, at])
            axes.plot(at, w[row, at], color=FIRST, linewidth=2.6, alpha=0.6, marker=marker)
            axes.plot(at, g[row, at], color=SECOND, linewidth=1.2, linestyle="--")
            axes.plot(at, amplified, color=THIRD, linewidth=1.2, linestyle=":")
            axes.set_ylabel(f"row {row}")
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.axhline(0, color=FAINT, linewidth=0.6, zorder=0)
        panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        svg = to_svg(figure, name=name, title=heading, description=says)
    return Chart(heading=heading, svg=svg, says=says)
