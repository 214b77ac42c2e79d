"""What an experiment's runs found, as plain values."""

from __future__ import annotations

import json
from typing import Any

from fisher_ray.experiment.settings import Experiment, Planned
from fisher_ray.journal import EVENTS_FILE, read_run
from fisher_ray.storage import Storage


def collect(experiment: Experiment) -> list[dict[str, Any]]:
    """Return what there is of each finished run.

    Returns:
        For each, in the experiment's order, ``steps``, ``seed``, ``views`` and ``workers`` as planned; ``num_workers``
        that its features were shared out among; ``accuracy``, ``seconds`` and ``num_test`` of its results;
        ``validation``, the linear model's accuracy on its validation rows; ``converged``, the path of training to
        convergence; and by stage its ``seconds`` and those of its ``units``.
    """
    found = []
    for planned in experiment.planned():
        storage = Storage(f"{experiment.output.rstrip('/')}/{planned.folder}")
        if storage.exists("report/results.json"):
            found.append(_collected(planned, storage))
    return found


def _collected(planned: Planned, storage: Storage) -> dict[str, Any]:
    results, run = json.loads(storage.read_bytes("report/results.json")), read_run(storage)
    workers, units = set[str](), {name: dict[int, float]() for name in run["stages"]}
    for line in storage.read_bytes(EVENTS_FILE).splitlines():
        event = json.loads(line)
        if event["event"] == "unit done" and event["stage"] in units:
            units[event["stage"]].setdefault(event["unit"], sum(event["seconds"].values()))  # once, though done twice
            workers |= {event["worker"]} if event["stage"] == "features/train" else set()
    stages = {
        name: {"seconds": record["seconds"], "units": [*units[name].values()]} for name, record in run["stages"].items()
    }
    asked = run["config"]["runtime"]["num_workers"]  # workers that were lost and made anew have other names
    path = run["stages"].get("linear", {}).get("result", {}).get("path") or []
    return {
        "steps": planned.steps,
        "seed": planned.seed,
        "views": planned.views,
        "workers": planned.workers,
        "num_workers": asked if isinstance(asked, int) else max(1, len(workers)),
        "accuracy": results["accuracy"],
        "seconds": results["seconds"],
        "num_test": results["num_test"],
        "validation": max((point["accuracy"] for point in path), default=None),
        "converged": run["stages"].get("converged", {}).get("result", {}).get("path"),
        "stages": stages,
    }
