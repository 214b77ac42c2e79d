"""The models side by side, as text: the rows of every table and figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fisher_ray.linear import wilson_interval

LABELS = {
    "base": "base network",
    "linear_probe": "linear probe on its last hidden layer",
    "linear_probe_ridge": "the same, fitted as ridge regression",
    "linear_probe_logistic": "the same, fitted as logistic regression",
    "trained_on": "base trained on, same data and time",
    "converged": "base trained on with it to convergence",
    "gradnet": "GradNet",
    "fisher_linear": "linear model on Fisher features",
}
"""What each key of ``accuracy`` is called, in the order shown."""
OPTIONAL = ("gradnet", "converged", "linear_probe_ridge", "linear_probe_logistic")
"""Models that are left out, rather than shown as not run, when they have no accuracy."""
ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """One model on the clean test samples.

    Attributes:
        key: in ``results["accuracy"]``.
        label: what it is called.
        accuracy: a share, or None when the model was not run.
        interval: its 95 % interval, or None.
        gain: accuracy less the base network's, or None, as for the base network itself.
    """

    key: str
    label: str
    accuracy: float | None
    interval: tuple[float, float] | None
    gain: float | None

    def cells(self) -> tuple[str, str, str, str]:
        """Return label, accuracy, difference to the base in points, and interval, ready to print."""
        accuracy = ABSENT if self.accuracy is None else percent(self.accuracy)
        gain = ABSENT if self.gain is None else f"{100 * self.gain:+.1f}".replace("-", "−")
        interval = ABSENT if self.interval is None else f"{100 * self.interval[0]:.1f} – {100 * self.interval[1]:.1f} %"
        return self.label, accuracy, gain, interval


def compare(results: Mapping[str, Any], intervals: Mapping[str, Sequence[float]] | None = None) -> list[Row]:
    """List the models in order.

    Args:
        results: the content of ``results.json``.
        intervals: 95 % intervals by key; Wilson's where there is none.
    """
    accuracies, rows = results["accuracy"], []
    for key, label in LABELS.items():
        accuracy = accuracies.get(key)
        if accuracy is None:
            rows += [] if key in OPTIONAL else [Row(key, label, None, None, None)]
            continue
        low, high = (intervals or {}).get(key) or wilson_interval(
            round(accuracy * results["num_test"]), results["num_test"]
        )
        base = accuracies.get("base")
        gain = None if key == "base" or base is None else accuracy - base
        rows.append(Row(key, label, accuracy, (low, high), gain))
    return rows


def shallow_key(results: Mapping[str, Any]) -> str:
    """Return the key of the model that the run is about: GradNet where it is the only shallow one."""
    accuracy = results["accuracy"]
    alone = accuracy.get("fisher_linear") is None and accuracy.get("gradnet") is not None
    return "gradnet" if alone else "fisher_linear"


def conditions(results: Mapping[str, Any]) -> str:
    """Say on what the models were compared."""
    text = f"{results['num_test']:,} clean test samples, the same for every model"
    if results.get("views") == 2:
        text += "; every model's scores or features averaged over a sample and its mirror image"
    if results.get("view_mode") == "stack":
        text += ", each of which the linear models were fitted on as a row of its own"
    return text


def percent(share: float) -> str:
    """Format a share as per cent."""
    return f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    """Format a duration."""
    if value < 100:
        return f"{value:.1f} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{value:.0f} s"
