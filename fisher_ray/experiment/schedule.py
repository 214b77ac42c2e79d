"""What a stage would have taken with another number of workers, from the seconds of its units."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

SHALLOW_STAGES = ("basis", "metric", "features/train", "linear")
"""What a linear model on Fisher features takes, test rows aside."""
ROUTES = {
    "fisher_linear": SHALLOW_STAGES,
    "gradnet": ("gradnet/ranges", "gradnet/entries", "gradnet"),
    "trained_on": ("trained_on",),
    "converged": ("converged",),
}
"""The stages that take a base network to each model."""


def makespan(seconds: Sequence[float], num_workers: int) -> float:
    """Return when the last of some units ends that are given, in order, to whichever worker is free first.

    Raises:
        ValueError: if there are no workers.
    """
    if num_workers < 1:
        raise ValueError(f"{num_workers} workers are none")
    ends = [0.0] * num_workers
    for value in seconds:
        heapq.heapreplace(ends, ends[0] + value)
    return max(ends)


def route_seconds(stages: Mapping[str, Mapping[str, Any]], model: str = "fisher_linear") -> float | None:
    """Return what all stages of a model's route took together; None if none of them was run."""
    taken = [stages[name]["seconds"] for name in ROUTES[model] if name in stages]
    return float(sum(taken)) if taken else None


def computed_seconds(stages: Mapping[str, Mapping[str, Any]], num_workers: int, measured_with: int) -> float:
    """Return what the shallow route would have taken with ``num_workers``.

    Its units are dealt out anew; what else a stage took (merging, decomposing, solving, starting) stays as it was.

    Args:
        stages: by name ``seconds``, and of its ``units`` the seconds each.
        num_workers: to compute for.
        measured_with: workers that the run had.
    """
    total = 0.0
    for stage in (stages[name] for name in SHALLOW_STAGES if name in stages):
        rest = max(0.0, stage["seconds"] - makespan(stage["units"], measured_with))
        total += rest + makespan(stage["units"], num_workers)
    return total
