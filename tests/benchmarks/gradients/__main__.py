"""Time of per-sample gradients over that of a plain forward and backward, all interleaved in one process.

    python -m tests.benchmarks.gradients [--workloads W1,W2,W3] [--rounds 9] [--threads 2] [--json FILE]
    python -m tests.benchmarks.gradients --device cuda [--workloads W1,W3,W4] [--batches 128,1024]

On a CPU each workload runs twice in processes of its own: with the allocator's defaults, and with memory kept
(``GLIBC_TUNABLES``), since on many machines a fresh page costs as much as the arithmetic. On a GPU it runs in float32
and in bfloat16. A ratio is the median over rounds of one method's time over the plain one's of the same round. Other
libraries take part on a CPU, where they are installed:

    pip install accelerate datasets einops jaxtyping ml_dtypes natsort opt_einsum peft petname simple-parsing tqdm \\
        transformers unfoldNd && pip install --no-deps --ignore-requires-python opacus backpack-for-pytorch traker \\
        dattri logix-ai bergson

Without their dependencies, since some would change torch for a vision library that is not needed here; LogIX names no
Python above 3.10 and works with 3.11.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fisher_ray.gradients import precision_of
from tests.benchmarks.gradients.methods import METHODS, Run
from tests.benchmarks.gradients.peers import PEERS
from tests.benchmarks.gradients.workloads import workload

TUNED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
WAYS = {"cpu": ("default", "tuned"), "cuda": ("float32", "bfloat16")}
"""How each workload runs: with one allocator or the other; in one precision or the other."""
SLOW = ("one sample at a time", "trak CPU projector")
"""Run twice only, and not on a GPU."""


def measure(name: str, rounds: int, only: set[str], device: str, way: str, batch: int | None) -> dict[str, float]:
    """Return the ratio of every method on one workload, and the plain time in milliseconds."""
    gpu = device != "cpu"
    work = workload(name, device, precision_of(way) if gpu else None, batch)

    def timed(run: Run) -> float:
        start = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    runs = {}
    for method, make in (METHODS if gpu else METHODS | PEERS).items():
        if method == "plain" or ((not only or method in only) and not (gpu and method in SLOW)):
            if (run := make(work)) is None:
                continue
            try:
                for _ in range(3 if gpu else 1):
                    timed(run)  # what is done once
            except torch.OutOfMemoryError:
                print(f"{name} {way} {batch}: {method}: out of memory", file=sys.stderr)
                continue
            runs[method] = run
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for number in range(rounds):
        for method, run in runs.items():
            if method in SLOW and number >= 2:
                continue
            seconds[method].append(timed(run))
    ratios = {
        method: statistics.median(s / p for s, p in zip(values, seconds["plain"], strict=False))
        for method, values in seconds.items()
    }
    return {"plain, ms": 1000 * statistics.median(seconds["plain"]), **ratios}


def profiled(name: str, method: str, device: str) -> str:
    """Return a table of the operations that one method spends its time in."""
    if (run := (METHODS | PEERS)[method](workload(name, device))) is None:
        return "does not apply"
    for _ in range(3):
        run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        for _ in range(5):
            run()
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=40))


def main() -> None:
    """Measure, print a table for each workload, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=WAYS, default="cpu")
    parser.add_argument("--batches", default="", help="samples, comma-separated; each workload's own by default")
    parser.add_argument("--methods", default="", help="comma-separated; all by default")
    parser.add_argument("--profile", metavar="METHOD", help="show where one method's time goes, and measure nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.inside:
        name, way, batch = options.inside.split(",")
        only = set(filter(None, options.methods.split(",")))
        print(json.dumps(measure(name, options.rounds, only, options.device, way, int(batch) or None)))
        return
    workloads = (options.workloads or ("W1,W2,W3" if options.device == "cpu" else "W1,W3,W4")).split(",")
    if options.profile:
        for name in workloads:
            print(f"{name}, {options.profile}\n{profiled(name, options.profile, options.device)}")
        return
    found: dict[str, dict[str, dict[str, float]]] = {}
    batches = [int(size) for size in filter(None, options.batches.split(","))]
    for name in workloads:
        for batch in batches or [0]:
            title = f"{name}, {batch} samples" if batch else name
            found[title] = {way: _measured(name, way, batch, options) for way in WAYS[options.device]}
            print(title.ljust(32), *(f"{way:>10}" for way in WAYS[options.device]))
            for method in dict.fromkeys(method for ratios in found[title].values() for method in ratios):
                print(f"  {method:32}", *(f"{ratios.get(method, math.nan):8.2f}  " for ratios in found[title].values()))
            sys.stdout.flush()
    if options.json:
        device = "cpu" if options.device == "cpu" else torch.cuda.get_device_name()
        machine = {"threads": options.threads, "torch": torch.__version__, "device": device}
        options.json.write_text(json.dumps({"machine": machine, "ratios": found}, indent=2) + "\n")


def _measured(name: str, way: str, batch: int, options: argparse.Namespace) -> dict[str, float]:
    environment = dict(os.environ)
    environment.pop("GLIBC_TUNABLES", None)
    if way == "tuned":
        environment["GLIBC_TUNABLES"] = TUNED
    command = [sys.executable, "-m", "tests.benchmarks.gradients", "--inside", f"{name},{way},{batch}"]
    command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    command += ["--device", options.device, "--methods", options.methods]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    ratios: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return ratios


if __name__ == "__main__":
    main()
