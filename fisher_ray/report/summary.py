"""From what the stages left behind to the results and the page's details."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fisher_ray.config import Config
from fisher_ray.report.comparison import shallow_key

_METRIC = ("dim", "trace", "captured", "effective_dim", "condition", "parts", "layers")
Stages = Mapping[str, Mapping[str, Any]]
_SHARED = {
    "metric": ("basis", "metric"),
    "features": ("features/train", "features/test"),
    "gradnet": ("gradnet/ranges", "gradnet/entries", "gradnet", "gradnet/validation", "gradnet/test"),
    "gradnet entries": ("gradnet/entries",),
}
"""Keys of ``results["seconds"]`` that several stages make up."""


def summarise(
    config: Config,
    stages: Stages,
    versions: Mapping[str, str],
    skipped: Mapping[str, Mapping[int, str]],
    num_halvings: int = 0,
    class_names: Sequence[str] | None = None,
    units: Iterable[Mapping[str, Any]] = (),
    pictures: Mapping[str, bytes] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of ``results.json``, and the details for the page.

    Args:
        config: the run's.
        stages: by name, ``seconds`` and ``result``; ``report`` has the evaluation's counts, and ``trained_on`` may be
            missing.
        versions: of Python and the packages.
        skipped: by split, the rows left out with their reasons.
        num_halvings: how often a micro-batch was cut for want of memory.
        class_names: of the labels, where the samples' source has them.
        units: the finished ones, as the events tell of them.
        pictures: of the examples, PNG by ``SPLIT-ROW``.
    """
    counts = stages["report"]["result"]
    metric, linear, tested = (stages.get(name, {}).get("result", {}) for name in ("metric", "linear", "gradnet/test"))
    accuracy: dict[str, float | None] = dict.fromkeys(
        ("base", "linear_probe", "trained_on", "fisher_linear", "gradnet")
    )
    accuracy |= {name: correct / counts["total"] for name, correct in counts["correct"].items()}
    # The same kind of model on both sides; the other kind of probe is shown too, since it may be the better one.
    accuracy["linear_probe"] = accuracy.pop(f"linear_probe_{config.linear.model}", None)
    trained_on = stages.get("trained_on", {}).get("result", {})
    if trained_on.get("correct") is not None:
        accuracy["trained_on"] = trained_on["correct"] / trained_on["total"]
    converged = stages.get("converged", {}).get("result", {})
    if converged.get("correct") is not None:
        accuracy["converged"] = converged["correct"] / converged["total"]
    if tested:
        accuracy["gradnet"] = tested["correct"]["gradnet"] / tested["total"]
    results = {
        "schema": 1,
        "num_test": counts["total"],
        "num_features": _num_features(config, metric, counts["num_classes"], stages),
        "views": config.linear.views,
        "view_mode": config.linear.view_mode,
        "accuracy": accuracy,
        "seconds": _all_seconds(stages),
        "samples_per_second": _rates(stages),
    }
    details = {
        "verdict": verdict(results, trained_on, _trained_for(config)),
        "metric": {key: value for key, value in metric.items() if key in _METRIC},
        "path": linear.get("path"),
        "layers": stages.get("basis", {}).get("result", {}).get("layers"),
        "gradnet": _gradnet(stages),
        "skipped": [
            {"split": split, "row": row, "reason": reason}
            for split, rows in skipped.items()
            for row, reason in sorted(rows.items())
        ],
        "num_halvings": num_halvings,
        "confusion": counts.get("confusion"),
        **{name: counts.get(name) for name in ("examples", "searched")},
        "pictures": pictures,
        "class_names": class_names,
        "workers": _workers(units),
        "environment": {**versions, "machine": f"{platform.node()}, {os.cpu_count()} cores, {platform.machine()}"},
    }
    return results, details


def _workers(units: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what each worker has done, by name."""
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        entry = found.setdefault(unit["worker"], {"units": 0, "rows": 0, "seconds": 0.0, "retries": 0})
        entry["units"] += 1
        entry["rows"] += unit["rows"][1] - unit["rows"][0]
        entry["seconds"] += sum(unit["seconds"].values())
        entry["retries"] += unit["attempt"] > 1
    return [{"worker": name, **found[name]} for name in sorted(found)]


def _num_features(config: Config, metric: Mapping[str, Any], num_classes: int, stages: Stages) -> int:
    if not metric:
        return int(stages["gradnet/entries"]["result"]["num_kept"])
    return int(metric["rank"]) * config.scores.num_scores(num_classes)


def _all_seconds(stages: Stages) -> dict[str, float]:
    """Return the wall time of what every run does; of GradNet and of training to convergence, where they were run."""
    found = {name: _seconds(stages, name) for name in ("base", "metric", "features", "linear", "trained_on")}
    return found | {name: _seconds(stages, name) for name in ("gradnet", "converged") if name in stages}


def _rates(stages: Stages) -> dict[str, float]:
    """Return the samples per second of each pass that was run."""
    counted = {"metric": "num_samples", "features": "num_rows", "gradnet entries": "num_rows"}
    parts = {"metric": ("metric",), "features": _SHARED["features"], "gradnet entries": ("gradnet/entries",)}
    return {
        name: sum(stages[part]["result"][key] for part in parts[name]) / max(_seconds(stages, name), 1e-9)
        for name, key in counted.items()
        if all(part in stages for part in parts[name])
    }


def _gradnet(stages: Stages) -> dict[str, Any] | None:
    """Return how GradNet was trained, and how it does on the validation rows; None if it was not."""
    if "gradnet" not in stages:
        return None
    validated = stages.get("gradnet/validation", {}).get("result", {})
    return {**stages["gradnet"]["result"], "validation": validated.get("gradnet"), "base": validated.get("base")}


def _seconds(stages: Stages, name: str) -> float:
    return float(sum(stages.get(part, {}).get("seconds", 0.0) for part in _SHARED.get(name, (name,))))


def _trained_for(config: Config) -> str:
    seconds = "auto" if config.trained_on is None else config.trained_on.seconds
    return "the same time" if seconds == "auto" else f"{seconds:g} s"


def verdict(results: Mapping[str, Any], trained_on: Mapping[str, Any], trained_for: str) -> str:
    """Say in a sentence how the linear model on Fisher features compares, or GradNet where it is the only one.

    Args:
        results: the content of ``results.json``.
        trained_on: what training on ended with: ``epochs``, and ``correct`` None if it diverged.
        trained_for: how long that was, in words.
    """
    accuracy = results["accuracy"]
    chosen = shallow_key(results)
    own = accuracy[chosen]
    probes = [key for key in accuracy if key.startswith("linear_probe") and accuracy[key] is not None]
    best_probe = max(probes, key=lambda key: float(accuracy[key]), default="linear_probe")
    names = {
        "base": "base network",
        best_probe: "best linear probe",
        "trained_on": f"base network trained on for {trained_for}",
    }
    others = [
        f"{100 * abs(own - accuracy[key]):.1f} points {'above' if own >= accuracy[key] else 'below'} the {name}"
        for key, name in names.items()
        if accuracy.get(key) is not None
    ]
    model = "GradNet" if chosen == "gradnet" else "The linear model on Fisher features"
    text = f"{model} gets {100 * own:.1f} % of {results['num_test']:,} test samples right"
    text += f": {_listed(others)}" if others else ""
    if accuracy.get("trained_on") is not None:
        return f"{text} ({trained_on['epochs']:.1f} passes over the same data)."
    return f"{text}. Training the base network on diverged." if trained_on else f"{text}."


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
