"""The benchmarks' figures: SVG whose bytes depend on what is drawn alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fisher_ray"}
WAY = ("compression", "estimator", "structure")


def draw_accuracies(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against rank, a line for each compression, estimator and structure."""
    figure, (axes,) = _start(1)
    _draw_ways(axes, [line for line in found if line["rank"]], lambda line: 100 * line["accuracy"])
    probe = next(line for line in found if not line["rank"])
    axes.axhline(100 * probe["accuracy"], color="gray", linestyle="--", label="last hidden layer alone")
    axes.set(xlabel="rank", ylabel="test accuracy, %")
    _finish(figure, path)


def draw_kernel_errors(found: Mapping[str, Any], path: Path) -> None:
    """Draw the relative error of the kernel against rank: of whole scores on the left, of compressed ones beside it."""
    figure, (left, right) = _start(2)
    first = found["metrics"][0]
    exact = [line for line in found["metrics"] if all(line[key] == first[key] for key in WAY)]
    whole = [line for line in found["metrics"] if line["compression"] == "identity"]
    compressed = [line for line in found["metrics"] if line["compression"] != "identity"]
    for axes, lines in ((left, whole), (right, exact + compressed)):
        _draw_ways(axes, lines, lambda line: line["error"])
        axes.axhline(found["euclidean"]["error"], color="gray", linestyle="--", label="best multiple of dot products")
        axes.set(xlabel="rank", yscale="log", ylim=(0.05, 2))  # at full rank the exact sum is below: rounding
    left.set(ylabel="error of the damped kernel, relative", title=f"all {found['num_parameters']} parameters")
    right.set(title=f"at most {max(line['dim'] for line in compressed)} coordinates")
    _finish(figure, path)


def draw_trace(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the share of the trace that the coordinates hold, and of that the leading eigenvalues' share."""
    figure, (left, right) = _start(2)
    left.semilogx([line["dim"] for line in found], [line["share"] for line in found], marker="o", base=2)
    left.set(xlabel="D", ylabel="share of the whole Fisher's trace", ylim=(0, 1.03))
    for line in found:
        ranks, shares = list(line["captured"]), list(line["captured"].values())
        right.semilogx(ranks, shares, marker="o", label=f"D = {line['dim']}", base=2)
    right.set(xlabel="R", ylabel="share of the D coordinates' trace", ylim=(0, 1.03))
    _finish(figure, path)


def draw_rescaling(found: Mapping[str, Any], path: Path) -> None:
    """Draw the relative change of the kernel against rank."""
    figure, (axes,) = _start(1)
    for name in ("damped", "undamped"):
        points = [(line["rank"], line[name]) for line in found["metrics"]]
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(found["euclidean"], color="gray", linestyle="--", label="plain dot products")
    axes.set(xlabel="rank", ylabel="change of the kernel, relative")
    _finish(figure, path)


def _draw_ways(axes: Axes, found: Sequence[Mapping[str, Any]], value: Any) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for line in found:
        lines.setdefault(", ".join(line[key] for key in WAY), []).append((line["rank"], value(line)))
    for (name, points), marker in zip(lines.items(), itertools.cycle("os^vDxP*+"), strict=False):
        axes.semilogx(*zip(*points, strict=True), marker=marker, fillstyle="none", linewidth=1, label=name, base=4)


def _start(num_panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7 if num_panels == 1 else 10, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def _finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(True, linewidth=0.4)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
    with mpl.rc_context(_STYLE):
        figure.savefig(path, metadata={"Date": None})
