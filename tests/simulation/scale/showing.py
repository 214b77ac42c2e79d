"""What was found, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.simulation.scale.running import Found

_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fisher_ray"}
_HEADS = (
    "scenario", "workers", "unit rows", "start, s", "metric, s", "features, s", "efficiency", "metric; features",
    "with start and eigenvectors", "driver's load", "driver, ms a unit", "moved, GB", "storage, TB", "sums held, GB",
    "computed in vain", "machines lost",
)  # fmt: skip


def table(found: Sequence[Found]) -> str:
    """Return a table in Markdown."""
    lines = [_line(_HEADS), _line(["---"] * len(_HEADS))]
    for one in found:
        cells = (
            one.scenario, f"{one.num_workers:,}", f"{one.unit_rows:,}", f"{one.start_s:.0f}", f"{one.metric_s:.1f}",
            f"{one.features_s:.1f}", f"{one.efficiency:.1%}",
            f"{one.metric_efficiency:.1%}; {one.features_efficiency:.1%}", f"{one.whole_efficiency:.1%}",
            f"{one.driver_load:.1%}", f"{1000 * one.driver_unit_s:.2f}", f"{one.moved_bytes / 1e9:,.0f}",
            f"{one.storage_bytes / 1e12:.2f}", f"{one.held_bytes / 1e9:.1f}", f"{one.wasted:.2%}",
            str(one.lost_machines),
        )  # fmt: skip
        lines.append(_line(cells))
    return "\n".join(lines)


def draw(found: Sequence[Found], folder: Path) -> None:
    """Draw efficiency, seconds and the driver's load against the number of workers; SVG and PNG."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for name in dict.fromkeys(one.scenario for one in found):
        lines = [one for one in found if one.scenario == name]
        workers = [one.num_workers for one in lines]
        left.semilogx(workers, [100 * one.efficiency for one in lines], marker="o", base=2, label=f"{name}, passes")
        whole = [100 * one.whole_efficiency for one in lines]
        left.semilogx(workers, whole, marker="s", base=2, linestyle="--", label=f"{name}, start and eigenvectors too")
        middle.loglog(workers, [one.metric_s + one.features_s for one in lines], marker="o", base=2, label=name)
        right.semilogx(workers, [100 * one.driver_load for one in lines], marker="o", base=2, label=name)
    left.axhline(90, color="gray", linewidth=0.6)
    left.set(ylabel="efficiency, %", ylim=(0, 103))
    middle.set(ylabel="both passes, s")
    right.set(ylabel="driver's load, %", ylim=(0, 103))
    for axes in (left, middle, right):
        axes.set(xlabel="workers")
        axes.grid(True, linewidth=0.4)
        axes.legend(fontsize=7)
    with mpl.rc_context(_STYLE):
        figure.savefig(folder / "scale.svg", metadata={"Date": None})
    figure.savefig(folder / "scale.png", dpi=120)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
