"""Time of per-sample gradients over that of a plain forward and backward, all interleaved in one process.

    python -m tests.benchmarks.gradients [--workloads W1,W2,W3] [--rounds 9] [--threads 2] [--json FILE]

Each workload runs twice in processes of its own: with the allocator's defaults, and with memory kept
(``GLIBC_TUNABLES``), since on many machines a fresh page costs as much as the arithmetic. A ratio is the median over
rounds of one method's time over the plain one's of the same round. Other libraries take part where they are installed:

    pip install accelerate datasets einops jaxtyping ml_dtypes natsort opt_einsum peft petname simple-parsing tqdm \\
        transformers unfoldNd && pip install --no-deps --ignore-requires-python opacus backpack-for-pytorch traker \\
        dattri logix-ai bergson

Without their dependencies, since some would change torch for a vision library that is not needed here; LogIX names no
Python above 3.10 and works with 3.11.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.gradients.methods import METHODS
from tests.benchmarks.gradients.peers import PEERS
from tests.benchmarks.gradients.workloads import workload

TUNED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
SLOW = ("one sample at a time", "trak CPU projector")
"""Run twice only."""


def measure(name: str, rounds: int, only: set[str]) -> dict[str, float]:
    """Return the ratio of every method on one workload, and the plain time in milliseconds."""
    work = workload(name)
    runs = {}
    for method, make in (METHODS | PEERS).items():
        if (not only or method in only or method == "plain") and (run := make(work)) is not None:
            run()  # what is done once
            runs[method] = run
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for number in range(rounds):
        for method, run in runs.items():
            if method in SLOW and number >= 2:
                continue
            start = time.perf_counter()
            run()
            seconds[method].append(time.perf_counter() - start)
    ratios = {
        method: statistics.median(s / p for s, p in zip(values, seconds["plain"], strict=False))
        for method, values in seconds.items()
    }
    return {"plain, ms": 1000 * statistics.median(seconds["plain"]), **ratios}


def main() -> None:
    """Measure, print a table for each workload, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W1,W2,W3")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="", help="comma-separated; all by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    only = set(filter(None, options.methods.split(",")))
    if options.inside:
        print(json.dumps(measure(options.inside, options.rounds, only)))
        return
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.workloads.split(","):
        found[name] = {}
        for allocator in ("default", "tuned"):
            environment = dict(os.environ)
            environment.pop("GLIBC_TUNABLES", None)
            if allocator == "tuned":
                environment["GLIBC_TUNABLES"] = TUNED
            command = [sys.executable, "-m", "tests.benchmarks.gradients", "--inside", name, "--rounds"]
            command += [str(options.rounds), "--threads", str(options.threads), "--methods", options.methods]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found[name][allocator] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}{'':28} default    tuned")
        for method, value in found[name]["default"].items():
            print(f"  {method:28} {value:8.2f} {found[name]['tuned'][method]:8.2f}")
    if options.json:
        machine = {"threads": options.threads, "torch": torch.__version__}
        options.json.write_text(json.dumps({"machine": machine, "ratios": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
