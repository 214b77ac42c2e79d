"""What a metric costs: its passes over the gradients they are made of, its merges, and the driver's memory.

    python -m tests.benchmarks.metric.cost [--parts passes,merge,driver] [--rounds 3] [--json FILE]

``passes``: the paper's CNN with ten classes, one unit of 256 rows, metrics of rank 1,024, one thread as a worker has.
Every round times, one after the other, the scores of all classes (``engine.all_classes``), these and their compression
(with ``compressor.compress``: the gradients that the metric is made of), and each pass whole: ``fisher_pass`` from the
pictures to the sums' arrays, with ``damping: auto``, and ``kronecker_pass``. A ratio is the median over rounds of a
pass's time over that of the same round's gradients, or of its scores alone. It runs in processes of their own: with the
allocator's defaults, and with memory kept, as workers keep it.

``merge``: 64 units' sums of a metric of 4,096 coordinates with ``damping: auto``, so of two matrices each, merged by
two workers of an embedded Ray. Tasks return a ready-made sum; what is timed is :meth:`Pool.reduce` from the first task
to the last merge, with the way of every sum through the object store.

``driver``: the driver's resident memory after reducing 8, 32 and 128 units of a metric of 529 coordinates, each with
sums of 2.5 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fisher_ray.runtime.session import MALLOC
from tests.benchmarks.metric.merging import measure_driver, measure_merge
from tests.benchmarks.metric.pass_times import WAYS, measure_passes

PARTS = ("passes", "merge", "driver")
CASES = [(dim, batch) for dim in (1024, 2048) for batch in (64, 32)]
"""Coordinates, micro-batch."""


def passes(rounds: int) -> dict[str, Any]:
    """Measure every case with both allocators, and print a table for each."""
    found: dict[str, Any] = {}
    for dim, batch in CASES:
        by_allocator = {}
        for allocator in ("default", "tuned"):
            environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
            if allocator == "tuned":
                environment["GLIBC_TUNABLES"] = MALLOC
            command = [sys.executable, "-m", "tests.benchmarks.metric.cost", "--inside", f"{dim},{batch}"]
            done = subprocess.run(
                [*command, "--rounds", str(rounds)], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
            by_allocator[allocator] = json.loads(done.stdout.splitlines()[-1])
        found[f"dim {dim}, micro-batch {batch}"] = by_allocator
        times = ", ".join(
            f"{allocator} {value['scores_s']:.2f} and {value['gradients_s']:.2f} s"
            for allocator, value in by_allocator.items()
        )
        print(f"D {dim}, micro-batch {batch}: scores alone, and compressed: {times}")
        print(f"  {'over compressed | scores':30} default        tuned")
        for name in (*WAYS, "kronecker pass"):
            pairs = [by_allocator[allocator]["ratios"][name] for allocator in ("default", "tuned")]
            print(f"  {name:30} " + "  ".join(f"{a:5.2f} | {b:4.2f}" for a, b in pairs), flush=True)
    return found


def main() -> None:
    """Measure the parts asked for, print tables, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        dim, batch = map(int, options.inside.split(","))
        print(json.dumps(measure_passes(dim, batch, options.rounds)))
        return
    measures = {"passes": lambda: passes(options.rounds), "merge": measure_merge, "driver": measure_driver}
    found = {part: measures[part]() for part in options.parts.split(",")}
    if options.json:
        options.json.write_text(json.dumps({**found, "load": os.getloadavg()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
