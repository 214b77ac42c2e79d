"""The figures of a run's page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl

from fisher_ray.report.comparison import Row, percent, seconds
from fisher_ray.report.drawing import ACCENT, BAR, DASHES, INK, STYLE, Drawing, finish, only_bottom, plain, start

MOST_LAYERS = 8
"""Layers whose spectra are drawn."""
MOST_TICKS = 6
"""Penalties that have a tick each; of more, the decades have one."""


@mpl.rc_context(STYLE)
def accuracy_bars(rows: Sequence[Row]) -> Drawing:
    """Draw the models' accuracies with their intervals."""
    shown = [row for row in rows if row.accuracy is not None and row.interval is not None]
    figure, axes = start(0.52 * len(shown) + 0.6)
    for place, row in enumerate(shown):
        value, (low, high) = row.accuracy or 0.0, row.interval or (0.0, 0.0)
        axes.barh(place, value, height=0.3, color=ACCENT if row.key == "fisher_linear" else BAR)
        axes.errorbar(value, place, xerr=[[value - low], [high - value]], color=INK, capsize=3, linewidth=1.2)
        axes.text(0, place - 0.24, row.label, va="bottom")
        axes.text(1, place - 0.24, percent(value), va="bottom", ha="right")
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.6, -0.75), xlabel="accuracy on the test samples")
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    only_bottom(axes)
    text = "; ".join(f"{row.label} {row.cells()[1]}, interval {row.cells()[3]}" for row in shown)
    caption = "Accuracy on the test samples; the whiskers are 95\u00a0% intervals."
    return finish(figure, "accuracy", caption, f"Bar chart of test accuracies with 95 % intervals: {text}.")


@mpl.rc_context(STYLE)
def spectrum(parts: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draw the metric's eigenvalues and its damping, on logarithmic axes.

    Args:
        parts: each with ``eigvals`` and ``damping``; those of several are drawn as one spectrum, with the range of
            their dampings.
    """
    positive = sorted((value for part in parts for value in part["eigvals"] if value > 0), reverse=True)
    dampings = sorted(part["damping"] for part in parts)
    figure, axes = start(3.0)
    axes.loglog(range(1, len(positive) + 1), positive, color=ACCENT, linewidth=2)
    low, high = dampings[0], dampings[-1]
    text = f"damping {low:.2g}" if low == high else f"dampings {low:.2g} to {high:.2g}"
    for value in dict.fromkeys(damping for damping in (low, high) if damping > 0):
        axes.axhline(value, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
    if high > 0:
        axes.annotate(text, (1, high), (2, 3), textcoords="offset points", va="bottom")
    axes.set(xlabel="eigenvalue, by size", ylabel="eigenvalue of the Fisher metric")
    axes.grid(True, linewidth=0.5)
    described = f"{len(positive)} eigenvalues from {positive[0]:.2g} to {positive[-1]:.2g}, {text}."
    caption = "Eigenvalues of the Fisher metric. Directions below the damping count for less."
    return finish(figure, "spectrum", caption, f"Line chart on logarithmic axes: {described}")


@mpl.rc_context(STYLE)
def layer_spectra(layers: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draw the eigenvalues of the layers' own blocks of the metric, on logarithmic axes.

    Args:
        layers: each with ``name`` and ``eigvals``; of more than :data:`MOST_LAYERS`, those of the largest sums. What
            is below ``1e-8`` of the largest of all is left out.
    """
    floor = 1e-8 * max(max(layer["eigvals"], default=0.0) for layer in layers)
    whole = [layer for layer in layers if any(value > floor for value in layer["eigvals"])]
    shown = sorted(whole, key=lambda layer: -sum(layer["eigvals"]))[:MOST_LAYERS]
    figure, axes = start(3.4)
    looks = itertools.product(DASHES, (ACCENT, INK, BAR))
    for layer, (dashes, color) in zip(shown, looks, strict=False):
        positive = [value for value in layer["eigvals"] if value > floor]
        name = plain(layer["name"]).lstrip("_")  # a name that begins so would not be in the legend
        axes.loglog(range(1, len(positive) + 1), positive, color=color, linestyle=dashes, linewidth=1.6, label=name)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    axes.set(xlabel="eigenvalue, by size", ylabel="eigenvalue of the layer's block")
    axes.grid(True, linewidth=0.5)
    text = "; ".join(f"{layer['name']} from {layer['eigvals'][0]:.2g}" for layer in shown)
    caption = "Eigenvalues of each layer's own block of the metric."
    if len(layers) > MOST_LAYERS:
        caption += f" The {MOST_LAYERS} layers that have most of it."
    return finish(figure, "layers", caption, f"Line chart on logarithmic axes of each layer's eigenvalues: {text}.")


@mpl.rc_context(STYLE)
def timeline(stages: Mapping[str, float]) -> Drawing:
    """Draw the wall time of the stages, one after the other."""
    figure, axes = start(0.3 * len(stages) + 0.6)
    names, values = list(stages), list(stages.values())
    ends = list(itertools.accumulate(values))
    axes.barh(range(len(names)), values, left=[end - value for end, value in zip(ends, values, strict=True)], color=BAR)
    for place, (end, value) in enumerate(zip(ends, values, strict=True)):
        early = end <= 0.75 * ends[-1]  # beside the bar there is room for its seconds
        where, shift, side = (end, 4, "left") if early else (end - value, -4, "right")
        axes.annotate(seconds(value), (where, place), (shift, 0), textcoords="offset points", va="center", ha=side)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel="seconds from the start", xlim=(0, ends[-1] or 1))
    axes.set_yticks(range(len(names)), [plain(name) for name in names])
    axes.tick_params(axis="y", length=0)
    text = ", ".join(f"{name} {seconds(value)}" for name, value in stages.items())
    caption = f"Wall time of the stages, one after the other: {seconds(ends[-1])} in all."
    return finish(figure, "timeline", caption, f"Bar chart of seconds per stage: {text}.")


@mpl.rc_context(STYLE)
def penalty_path(path: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draw validation accuracy against the penalty, a line for each rank and damping, the best point marked."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in path:
        lines.setdefault(_variant(point), []).append((float(point["penalty"]), float(point["accuracy"])))
    best = max((point for points in lines.values() for point in points), key=lambda point: point[::-1])
    figure, axes = start(3.0)
    for number, points in enumerate(lines.values()):
        style = DASHES[number % len(DASHES)]
        look = {"color": BAR, "marker": "o", "linewidth": 2, "linestyle": style, "clip_on": False}
        axes.semilogx(*zip(*sorted(points), strict=True), **look)
    axes.plot(*best, color=ACCENT, marker="o", markersize=9, clip_on=False)
    axes.annotate(f"{best[0]:g}: {percent(best[1])}", best, (0, 9), textcoords="offset points", ha="center")
    if len(lines) > 1:
        axes.legend([name or "all" for name in lines], frameon=False, fontsize="small")
    penalties = sorted({penalty for points in lines.values() for penalty, _ in points})
    if len(penalties) <= MOST_TICKS:
        axes.set_xticks(penalties, [f"{penalty:g}" for penalty in penalties])
        axes.minorticks_off()
    axes.margins(x=0.16, y=0.25)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, best[1] - 0.01), min(high, 1.0))  # no more than all, nor a fraction of a point spread out
    axes.set(xlabel="penalty, relative", ylabel="validation accuracy")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.1f} %")
    axes.grid(True, linewidth=0.5)
    text = "; ".join(
        f"{name}: " * bool(name)
        + ", ".join(f"{percent(accuracy)} at {penalty:g}" for penalty, accuracy in sorted(points))
        for name, points in lines.items()
    )
    caption = "Accuracy on the validation rows against the penalty; the best penalty is kept."
    return finish(figure, "penalty", caption, f"Line chart of validation accuracy against the penalty: {text}.")


def _variant(point: Mapping[str, Any]) -> str:
    """Say which rank and damping a point of the path has, where they were chosen among."""
    parts = [f"{name} {point[name]:g}" for name in ("rank", "damping") if point.get(name) is not None]
    return ", ".join(parts)
