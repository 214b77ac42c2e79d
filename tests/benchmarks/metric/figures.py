"""The benchmarks' figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


def draw_accuracies(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against rank, a line for each compression, estimator and structure."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for line in found:
        if line["rank"]:
            name = ", ".join(line[key] for key in ("compression", "estimator", "structure"))
            lines.setdefault(name, []).append((line["rank"], 100 * line["with_hidden"]))
    for name, points in lines.items():
        axes.semilogx(*zip(*points, strict=True), marker="o", label=name, base=4)
    probe = next(line for line in found if not line["rank"])
    axes.axhline(100 * probe["accuracy"], color="gray", linestyle="--", label="last hidden layer alone")
    axes.set(xlabel="rank", ylabel="test accuracy, %")
    axes.legend(fontsize=7)
    axes.grid(True, linewidth=0.4)
    figure.savefig(path)
