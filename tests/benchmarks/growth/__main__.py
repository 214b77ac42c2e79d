"""How time and memory grow with samples, parameters, classes and workers.

    python -m tests.benchmarks.growth [--curves rows,parameters,classes,workers] [--rounds 1] [--figure FILE]

Every point is a process of its own. ``rows``: 1,000 to 10⁶ samples of a network of 2,410 parameters.
``parameters``: 10⁵ to 10⁸ of them in nine layers, 128 samples, for each of ``--compressions``. ``classes``: 2 to 1,000
of a small network, 512 samples, for the scores of each of ``--labels``, or 64 ``buckets`` of all classes.
``workers``: a run of the CNN on an embedded Ray, with one and with two.

Printed are seconds of the metric and of the features (the processor's, in one thread by default, so that what else the
machine does changes them little; of a run by the clock), and peak memory beyond that of the process before it began (of
a run the sum over all its processes, of shared pages each one's part); and the exponents of straight lines through the
upper half of a curve's points on a log-log scale. ``--figure`` takes SVG or PNG.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from tests.benchmarks.growth.point import CURVES
from tests.benchmarks.peers.watching import watch

TIMEOUT_S = 900.0
VALUES = {
    "rows": (1_000, 4_000, 16_000, 64_000, 250_000, 1_000_000),
    "parameters": (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000),
    "classes": (2, 10, 30, 100, 300, 1_000),
    "workers": (1, 2),
}
MEASURED = ("metric_s", "features_s", "peak_bytes")
Point = dict[str, float]


def main() -> None:
    """Measure, print tables, draw and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", default=",".join(CURVES))
    parser.add_argument("--labels", default="all,buckets,sampled", help="whose scores, of the curves over classes")
    parser.add_argument("--compressions", default="random,kronecker", help="of the curves over parameters")
    parser.add_argument("--largest", type=int, help="no point beyond this value")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = {
        "rows": ["all"],
        "parameters": options.compressions.split(","),
        "classes": options.labels.split(","),
        "workers": ["all"],
    }
    found: dict[str, list[Point]] = {}
    for curve in options.curves.split(","):
        values = [value for value in VALUES[curve] if value <= (options.largest or value)]
        for way in ways[curve]:
            title = f"{curve}, {way}"
            print(f"{title}\n  {'':>14}{'metric, s':>12}{'features, s':>12}{'memory, MB':>12}")
            found[title] = _curve(curve, values, way, options.rounds, options.threads)
            if curve != "workers":
                _print_exponents(found[title])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.figure:
        draw(found, options.figure)


def _curve(curve: str, values: Sequence[int], way: str, rounds: int, threads: int) -> list[Point]:
    """Measure and print every point, until one fails."""
    points: list[Point] = []
    for value in values:
        seen = [measured(curve, value, way, threads) for _ in range(rounds)]
        if any(each is None for each in seen):
            break
        good = [each for each in seen if each is not None]
        points.append({"value": good[0]["value"], **{name: median(each[name] for each in good) for name in MEASURED}})
        point = points[-1]
        seconds = f"{point['metric_s']:12.2f}{point['features_s']:12.2f}"
        print(f"  {point['value']:14,.0f}{seconds}{point['peak_bytes'] / 1e6:12.0f}", flush=True)
    return points


def measured(curve: str, value: int, way: str, threads: int) -> Point | None:
    """Measure one point; None, and a line, if it fails or takes too long."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait take the cores from what else runs
    }
    command = [sys.executable, "-m", "tests.benchmarks.growth.point", curve, str(value), way, str(threads)]
    seen = watch(command, environment, TIMEOUT_S)
    if seen.code:
        print(f"  {value:14,} {(seen.error.strip().splitlines() or ['no message'])[-1]}", flush=True)
        return None
    return {"peak_bytes": seen.peak_bytes, **json.loads(seen.output.strip().splitlines()[-1])}


def exponent(points: Sequence[Point], name: str) -> float:
    """Return the slope of a straight line through the upper half of the points, both axes logarithmic."""
    upper = points[len(points) // 2 :]
    x, y = (np.log([max(point[key], 1e-9) for point in upper]) for key in ("value", name))
    return float(np.polyfit(x, y, 1)[0])


def _print_exponents(points: Sequence[Point]) -> None:
    if len(points) > 3:
        print(f"  {'exponent':>14}", *(f"{exponent(points, name):11.2f}" for name in MEASURED), flush=True)


def draw(found: dict[str, list[Point]], place: Path) -> None:
    """Draw seconds and memory of every curve, a column for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(title.partition(",")[0] for title in found))
    figure, axes = pyplot.subplots(2, len(names), figsize=(4 * len(names), 6), squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        for title, points in found.items():
            if not title.startswith(f"{name},") or not points:
                continue
            x, way = [point["value"] for point in points], title.partition(", ")[2]
            axes[0, column].plot(x, [p["metric_s"] for p in points], "o-", label=f"metric, {way}")
            axes[0, column].plot(x, [p["features_s"] for p in points], "s--", label=f"features, {way}")
            axes[1, column].plot(x, [p["peak_bytes"] / 1e6 for p in points], "o-", label=way)
        for row, label in enumerate(("seconds", "memory, MB")):
            axes[row, column].set(xscale="log", yscale="log", xlabel=name, ylabel=label)
            axes[row, column].legend(fontsize="small")
            axes[row, column].grid(alpha=0.3)
        axes[1, column].set_ylim(bottom=10)  # what hardly changes is to look so
    figure.savefig(place)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
