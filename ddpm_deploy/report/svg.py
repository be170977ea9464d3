"""Matplotlib's figures inside a page: the same bytes every time, colours by CSS, text as text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

INK, FAINT, FIRST, SECOND, THIRD = ("#010101", "#020202", "#030303", "#040404", "#050505")
"""Stand-ins for colours that the page chooses, one set by day and one by night."""

_VARIABLES = {
    INK: "var(--ink-2)",
    FAINT: "var(--line)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "path.simplify": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Draws as the page does, whatever the user's own matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def to_svg(figure: Figure, *, name: str, title: str, description: str) -> Markup:
    """Returns a figure as an <svg> element.

    Args:
        figure: Drawn inside `style`.
        name: Of letters, digits and -, the only one of its kind on the page: its ids begin with it.
        title: What it shows, for those who cannot see it.
        description: What is to be seen there, with values.
    """
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    # The page's own font; matplotlib wrote those it measured with, before 3.11 behind the size.
    svg = re.sub(r"(font-family:|font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    svg = re.sub(r'\bid="|url\(#|href="#', lambda found: f"{found[0]}{name}-", svg)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None, "matplotlib writes a view box"
    head = (
        f'<svg {size[0]} role="img" aria-labelledby="{name}-title {name}-desc" class="chart">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    # Matplotlib's output is markup by construction: it escapes the text that it draws.
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1))  # noqa: S704
