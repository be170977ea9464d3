"""Speeds as bars, each with its error beside it: a picture that stands for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddpm_deploy.files import whole_file

SUFFIXES = (".svg", ".png")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
}
_OURS, _PEER, _FAINT = "#1f6f8b", "#b4b9bf", "#5d646b"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One loop.

    Attributes:
        name: What it is called.
        images_per_second: Its length.
        error: Of its output against the reference's; None where there is none.
        peer: Whether it is what people would use instead.
    """

    name: str
    images_per_second: float
    error: float | None
    peer: bool


def write_chart(groups: Sequence[tuple[str, Sequence[Bar]]], path: Path, *, title: str) -> None:
    """Draws a panel of bars for each group.

    Args:
        groups: Headings and their bars, top to bottom; each has at least one.
        path: Where to write: .svg or .png.
        title: What machine it was, above all panels.

    Raises:
        ValueError: The suffix is another.
        OSError: The file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}; charts end in {' or '.join(SUFFIXES)}")
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": "speed"})
        sizes = [len(bars) for _, bars in groups]
        height = sum(0.38 * n + 0.75 for n in sizes) + 0.7
        figure = Figure(figsize=(8.0, height), layout="constrained")
        figure.suptitle(title, fontsize=9, color=_FAINT, x=0.01, ha="left")
        panels = figure.subplots(len(groups), 1, height_ratios=sizes, squeeze=False)[:, 0]
        for axes, (heading, bars) in zip(panels, groups, strict=True):
            _draw(axes, heading, bars)
        panels[-1].set_xlabel("images a second, the sampler's whole loop")
        with whole_file(path) as partial:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(partial, dpi=150, metadata=metadata)


def _draw(axes: Axes, heading: str, bars: Sequence[Bar]) -> None:
    values = [bar.images_per_second for bar in bars]
    drawn = axes.barh(
        [bar.name for bar in bars],
        values,
        color=[_PEER if bar.peer else _OURS for bar in bars],
        height=0.68,
    )
    axes.bar_label(drawn, [_label(bar) for bar in bars], padding=4, fontsize=9, color=_FAINT)
    axes.set_xlim(0, 1.45 * max(values))  # room for the text beside the longest
    axes.invert_yaxis()
    axes.set_title(heading, fontsize=10, loc="left")
    axes.grid(visible=True, axis="x", color="#e4e6e8", linewidth=0.6)
    axes.set_axisbelow(True)


def _label(bar: Bar) -> str:
    rate = f"{bar.images_per_second:.3g}"
    if bar.error is None:
        return rate
    return f"{rate}   error {bar.error:.0e}" if bar.error else f"{rate}   the reference"
