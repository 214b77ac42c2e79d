"""An experiment's figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl

from fisher_ray.experiment.schedule import computed_seconds, route_seconds
from fisher_ray.experiment.tables import Runs, accuracies, caption, of_views
from fisher_ray.report import LABELS
from fisher_ray.report.drawing import ACCENT, BAR, DASHES, INK, STYLE, Drawing, finish, start

WORKERS = (1, 2, 4, 8, 16)
"""Numbers of workers that the time to accuracy is told for."""
_MARKS = "os^Dv*P"


@mpl.rc_context(STYLE)
def accuracy_by_snapshot(runs: Runs, views: int) -> Drawing:
    """Draw every model's test accuracy against the base network's steps, with the intervals over seeds."""
    figure, axes = start(4.2)
    looks = itertools.product(DASHES, (INK, BAR))
    for (key, cells), (dashes, color), mark in zip(
        accuracies(runs, views).items(), looks, itertools.cycle(_MARKS), strict=False
    ):
        steps, found = list(cells), list(cells.values())
        axes.errorbar(
            steps,
            [cell.mean for cell in found],
            yerr=[cell.half or 0.0 for cell in found],
            color=ACCENT if key in ("fisher_linear", "gradnet") else color,
            linestyle=dashes,
            marker=mark,
            capsize=3,
            linewidth=1.6,
            label=LABELS[key],
        )
    axes.set_xscale("log")
    axes.set(xlabel="steps of the base network", ylabel="test accuracy")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.grid(True, linewidth=0.5)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    told = "; ".join(
        f"{LABELS[key]} {', '.join(f'{cell.percent()} % at {steps}' for steps, cell in cells.items())}"
        for key, cells in accuracies(runs, views).items()
    )
    text = f"Test accuracy by the steps of the base network, {caption(runs, views)}."
    described = f"Line chart of test accuracy by the base network's steps: {told}."
    return finish(figure, f"snapshots-{views}", text, described)


@mpl.rc_context(STYLE)
def time_to_accuracy(runs: Runs, views: int, steps: int) -> Drawing | None:
    """Draw validation accuracy against seconds: training on, and the shallow route by its number of workers.

    One seed's: the first that trained to convergence. Measured points are filled, computed ones empty.

    Returns:
        Nothing, if no run of these trained to convergence and has a linear model.
    """
    chosen = [run for run in of_views(runs, views) if run["steps"] == steps]
    run = next((run for run in chosen if run["converged"] and run["validation"] is not None), None)
    if run is None:
        return None
    points = shallow_points(runs, run)
    figure, axes = start(3.6)
    path = run["converged"]
    axes.plot([look["seconds"] for look in path], [look["accuracy"] for look in path], color=BAR, linewidth=2)
    end = path[-1]
    axes.annotate("trained on", (end["seconds"], end["accuracy"]), (0, 6), textcoords="offset points", ha="right")
    for number, (seconds, measured) in points.items():
        face = ACCENT if measured else "none"
        axes.plot(seconds, run["validation"], marker="o", color=ACCENT, markerfacecolor=face, linestyle="none")
        axes.annotate(str(number), (seconds, run["validation"]), (0, 7), textcoords="offset points", ha="center")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set(xlabel="seconds from the snapshot on", ylabel="validation accuracy")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.grid(True, linewidth=0.5)
    told = ", ".join(
        f"{number} in {seconds:.0f} s ({'measured' if measured else 'computed'})"
        for number, (seconds, measured) in points.items()
    )
    described = f"Fisher features reach {100 * run['validation']:.1f} % with workers: {told}"
    described = f"Line chart of validation accuracy against seconds. {described}."
    return finish(figure, f"time-{views}-{steps}", _told(views, steps), described)


def shallow_points(runs: Runs, run: Mapping[str, Any]) -> dict[int, tuple[float, bool]]:
    """Return by number of workers the shallow route's seconds, and whether they were measured.

    Measured are those of the run itself and of the runs of the same snapshot and views that were made for their
    seconds; the others are computed from the run's own.
    """
    same = ("steps", "views")
    timed = [other for other in runs if other["workers"] is not None and all(other[key] == run[key] for key in same)]
    taken = {other["num_workers"]: route_seconds(other["stages"]) for other in (*timed, run)}
    measured = {number: value for number, value in taken.items() if value is not None}
    computed = {number: computed_seconds(run["stages"], number, run["num_workers"]) for number in WORKERS}
    return {number: (measured.get(number, computed[number]), number in measured) for number in WORKERS}


def _told(views: int, steps: int) -> str:
    looks = "one view" if views == 1 else "two views"
    return (
        f"Accuracy on validation rows against seconds, from the snapshot after {steps:,} steps, {looks}: the base "
        "network trained on with the same rows, and Fisher features with a linear model, by the number of workers. "
        "Filled points were measured; empty ones are computed from the measured seconds of the units. "
        "Training on counts the seconds of its steps alone, the shallow route all that its stages took."
    )
