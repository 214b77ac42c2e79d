"""How figures are drawn: inline in the page's colours and font, which follow its theme, and as files."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fisher_ray.storage import Storage

INK, ACCENT, BAR, LINE = "#1c2127", "#0969a8", "#98a5b3", "#d5dae0"
THEME = {INK: "--ink", ACCENT: "--accent", BAR: "--bar", LINE: "--line"}
"""Colours drawn with, and the page's variables that take their place on it."""
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
DOTS_PER_INCH = 220
"""Of a figure as PNG."""


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Attributes:
        name: of its own among a page's figures, and of its files.
        caption: what it shows, below it.
        markup: inline SVG in the page's colours, with a description for those who hear the page.
        svg: a file in the light colours, without a background.
        png: the same on white.
    """

    name: str
    caption: str
    markup: str
    svg: bytes
    png: bytes


def start(height: float) -> tuple[Figure, Axes]:
    """Return a figure of so many inches, and its axes."""
    figure = Figure(figsize=(INCHES, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def only_bottom(axes: Axes) -> None:
    """Leave the axes their lower side alone."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def plain(text: str) -> str:
    """Return a text that is drawn as it is."""
    return text.replace("$", r"\$")  # else a formula starts


def finish(figure: Figure, name: str, caption: str, description: str) -> Drawing:
    """Return a figure that is drawn.

    Args:
        figure: of :func:`start`.
        name: see :class:`Drawing`.
        caption: see :class:`Drawing`.
        description: what it shows in words and numbers.
    """
    vector, pixels = io.BytesIO(), io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has others
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(pixels, format="png", metadata={"Software": None, "Description": description})
    markup = _inline(vector.getvalue().decode(), name, description)
    return Drawing(name, caption, markup, vector.getvalue(), pixels.getvalue())


def write_drawings(storage: Storage, folder: str, drawings: Iterable[Drawing]) -> None:
    """Write each as ``FOLDER/NAME.svg`` and ``FOLDER/NAME.png``.

    Raises:
        StorageError: if they cannot be written.
    """
    for drawing in drawings:
        storage.write_bytes(f"{folder}/{drawing.name}.svg", drawing.svg)
        storage.write_bytes(f"{folder}/{drawing.name}.png", drawing.png)


def _inline(text: str, name: str, description: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style type.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)  # one page, several figures: ids stay unique
    text = re.sub(r"font: ((?:\w+ )?[\d.]+px)[^;\"]*", r"font: \1 var(--font)", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
