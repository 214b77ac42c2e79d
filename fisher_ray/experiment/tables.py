"""An experiment's numbers over its seeds, and the table that they make."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fisher_ray.experiment.schedule import route_seconds
from fisher_ray.report import LABELS

_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
"""Student's 97.5 % quantiles of 1 to 30 degrees of freedom; of more, that of 30 makes intervals a little too wide."""
ABSENT = "–"
SECONDS = {
    "fisher_linear": "seconds of metric, features and linear model",
    "gradnet": "seconds of GradNet's ranges, entries and training",
    "trained_on": "seconds of training on",
    "converged": "seconds of training to convergence",
}
"""What the time of each model's route is called, in the order shown."""

Runs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One number over the seeds.

    Attributes:
        mean: of the runs.
        half: half the width of the mean's 95 % interval by Student's t; None with one run.
        count: of the runs.
    """

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """Return the mean of one value or more, and its interval."""
        count = len(values)
        if count < 2:
            return cls(values[0], None, count)
        quantile = _T[min(count - 1, len(_T)) - 1]
        return cls(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count), count)

    def percent(self) -> str:
        """Return the mean and its interval in per cent."""
        return f"{100 * self.mean:.1f}" + ("" if self.half is None else f" ± {100 * self.half:.1f}")


def of_views(runs: Runs, views: int) -> list[Mapping[str, Any]]:
    """Return the runs with so many views that were not made for their seconds alone."""
    return [run for run in runs if run["views"] == views and run["workers"] is None]


def accuracies(runs: Runs, views: int) -> dict[str, dict[int, Cell]]:
    """Return by model, in the order shown, and by the base network's steps its test accuracy."""
    chosen, found = of_views(runs, views), dict[str, dict[int, Cell]]()
    for key in LABELS:
        for steps in sorted({run["steps"] for run in chosen}):
            values = [
                run["accuracy"][key] for run in chosen if run["steps"] == steps and run["accuracy"].get(key) is not None
            ]
            if values:
                found.setdefault(key, {})[steps] = Cell.of(values)
    return found


def seconds(runs: Runs, views: int, model: str) -> dict[int, Cell]:
    """Return by the base network's steps what a model's route took, of the snapshots that it was taken from."""
    found: dict[int, list[float]] = {}
    for run in of_views(runs, views):
        if (taken := route_seconds(run["stages"], model)) is not None:
            found.setdefault(run["steps"], []).append(taken)
    return {steps: Cell.of(found[steps]) for steps in sorted(found)}


def rows(runs: Runs, views: int) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows: what each is of, and a cell for each snapshot."""
    snapshots = sorted({run["steps"] for run in of_views(runs, views)})
    for key, cells in accuracies(runs, views).items():
        yield LABELS[key], *(cells[steps].percent() if steps in cells else ABSENT for steps in snapshots)
    for key, label in SECONDS.items():
        if spent := seconds(runs, views, key):
            yield label, *(f"{spent[steps].mean:.0f}" if steps in spent else ABSENT for steps in snapshots)


def columns(runs: Runs, views: int) -> tuple[str, ...]:
    """Return the table's heads."""
    snapshots = sorted({run["steps"] for run in of_views(runs, views)})
    return "test accuracy, %", *(f"{steps:,} steps" for steps in snapshots)


def caption(runs: Runs, views: int) -> str:
    """Say what the table is of."""
    chosen = of_views(runs, views)
    seeds = len({run["seed"] for run in chosen})
    looks = "one view" if views == 1 else "an image and its mirror image averaged, for every model"
    means = f"means over {seeds} seeds ± half of their 95 % interval" if seeds > 1 else "one seed"
    return f"{chosen[0]['num_test']:,} test samples, {looks}; {means}"


def markdown(runs: Runs) -> str:
    """Return the tables as Markdown."""
    parts = []
    for views in sorted({run["views"] for run in runs if run["workers"] is None}):
        head = columns(runs, views)
        lines = [f"{caption(runs, views)}:", "", _line(head), _line(["---"] * len(head))]
        parts.append("\n".join([*lines, *(_line(row) for row in rows(runs, views))]))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
