"""How figures are drawn: as inline SVG whose colours and font are the page's own, so that they follow its theme."""

from __future__ import annotations

import html
import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, ACCENT, BAR, LINE = "#010101", "#020202", "#030303", "#040404"
THEME = {INK: "--ink", ACCENT: "--accent", BAR: "--bar", LINE: "--line"}
"""Colours drawn with, and the page's variables that take their place."""
STYLE: dict[Any, Any] = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": LINE,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
INCHES = 4.6
"""Width: on a phone the letters are then about as large as the page's."""


def start(height: float) -> tuple[Figure, Axes]:
    """Return a figure of so many inches, and its axes."""
    figure = Figure(figsize=(INCHES, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def only_bottom(axes: Axes) -> None:
    """Leave the axes their lower side alone."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def plain(text: str) -> str:
    """Return a text that is drawn as it is."""
    return text.replace("$", r"\$")  # else a formula starts


def svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as markup.

    Args:
        figure: drawn.
        name: of the figure on its page.
        description: for those who hear the page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style type.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)  # one page, several figures: ids stay unique
    text = re.sub(r"font: ((?:\w+ )?[\d.]+px)[^;\"]*", r"font: \1 var(--font)", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
