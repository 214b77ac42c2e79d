"""The same work end to end by this package and by others: samples in, scores of queries on disk.

    python -m tests.benchmarks.peers [--workloads W1,W3] [--rounds 3] [--environment FOLDER] [--json FILE]

Every library gets the same samples, weights and threads, compresses each training row's gradient to the same number of
coordinates, stores it on disk, scores all rows for every query, and keeps the scores. W1 is the paper's CNN against
TRAK and dattri, one projection of the whole gradient; W3 a transformer of four layers against bergson, dattri and
LogIX, a two-sided projection of every linear layer. The others live in a virtual environment that pip makes in
``--environment``, once. Each turn is a process of its own, and turns are interleaved.

``fisher_ray`` is its functions in one process: scores of the labels, a sketch or projections, a sealed store, products
of blocks. ``fisher_ray on Ray`` is a run with a metric and a question to it, with two starts of Ray in its whole time.

Printed for each, medians over the rounds: samples a second of the whole process, of the work without imports and
starts, and of the gradients until they are stored; seconds of all cores together; peak memory of all its processes;
bytes stored a row; and rank correlations (Spearman, means over queries) of its dot products with the exact gradients',
and of its scores with the others'. CPU seconds hold on a machine that does other work as well; the others then vary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from tests.benchmarks.peers.environment import make_environment
from tests.benchmarks.peers.watching import watch
from tests.benchmarks.peers.work import EXACT_QUERIES, EXACT_ROWS, KINDS, OWN, prepare
from tests.benchmarks.ranks import spearman

TIMEOUT_S = 600.0
SIZES = {"W1": (2560, 128), "W3": (512, 64)}
"""Training rows and queries."""


def main() -> None:
    """Measure, print a table for each workload, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W1,W3")
    parser.add_argument("--libraries", default="", help="comma-separated; all by default")
    parser.add_argument("--rows", type=int, help="training rows, another number than the workload's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "fisher_ray" / "peers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pythons = {True: sys.executable, False: str(make_environment(options.environment))}
    print(f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}")
    found: dict[str, Any] = {}
    only = set(filter(None, options.libraries.split(",")))
    for name in options.workloads.split(","):
        libraries = [each for each in KINDS[name].libraries if not only or each in only]
        with tempfile.TemporaryDirectory() as folder:
            rows, queries = SIZES[name]
            rows = options.rows or rows
            prepare(name, Path(folder) / "work", rows, queries)
            turns = _turns(Path(folder), libraries, options.rounds, options.threads, pythons)
            found[name] = _summary(Path(folder), turns, rows)
        _print(f"{name}: {rows} rows, {queries} queries, {options.rounds} rounds", found[name])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def _turns(
    folder: Path, libraries: list[str], rounds: int, threads: int, pythons: Mapping[bool, str]
) -> dict[str, list[dict[str, Any]]]:
    """Run every library in turn, several times; one that fails is told once and left out."""
    turns: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
    environment = {
        **os.environ,
        "PYTHONPATH": os.getcwd(),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait take the cores from what else runs
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    for number in range(rounds):
        for library in [*turns]:
            out = folder / library
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            command = [pythons[library in OWN], "-m", "tests.benchmarks.peers.turn", library]
            seen = watch([*command, str(folder / "work"), str(out), str(threads)], environment, TIMEOUT_S)
            if seen.code:
                print(f"{library} cannot: {(seen.error.strip().splitlines() or ['no message'])[-1]}", flush=True)
                del turns[library]
                continue
            told = json.loads(seen.output.strip().splitlines()[-1])
            peak = max(seen.peak_bytes, told["peak_bytes"])
            turns[library].append({**told, "whole_s": seen.seconds, "cpu_s": seen.cpu_seconds, "peak_bytes": peak})
            print(f"round {number}: {library} {seen.seconds:.1f} s", file=sys.stderr, flush=True)
    return turns


def _summary(folder: Path, turns: Mapping[str, list[dict[str, Any]]], rows: int) -> dict[str, dict[str, Any]]:
    """Return each library's medians, and what its numbers have in common with the others'."""
    exact = np.load(folder / "work" / "exact.npy")
    scores = {library: np.load(folder / library / "scores.npy") for library in turns}
    products = {
        library: np.load(folder / library / "products.npy")
        if (folder / library / "products.npy").exists()
        else scores[library]
        for library in turns
    }
    found: dict[str, dict[str, Any]] = {}
    for library, each in turns.items():
        gradients = median(turn["seconds"]["gradients"] for turn in each)
        work = median(sum(turn["seconds"].values()) for turn in each)
        found[library] = {
            "version": each[0]["version"],
            "whole, samples/s": rows / median(turn["whole_s"] for turn in each),
            "work alone, samples/s": rows / work,
            "gradients, samples/s": rows / gradients,
            "CPU, s": median(turn["cpu_s"] for turn in each),
            "peak, MB": median(turn["peak_bytes"] for turn in each) / 1e6,
            "stored, bytes/row": each[0]["stored_bytes"] / rows,
            "correlation, exact": float(spearman(products[library][:EXACT_QUERIES, :EXACT_ROWS], exact).mean()),
            **{f"correlation, {other}": float(spearman(scores[library], scores[other]).mean()) for other in turns},
        }
    return found


def _print(title: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    print(title)
    print(f"  {'':32}", *(f"{library:>18}" for library in found))
    for name in dict.fromkeys(name for values in found.values() for name in values):
        cells = [values.get(name, "") for values in found.values()]
        digits = 2 if name.startswith("correlation") else 1
        print(f"  {name:32}", *(f"{cell:>18}" if isinstance(cell, str) else f"{cell:18,.{digits}f}" for cell in cells))
    sys.stdout.flush()


def _processor() -> str:
    """Return the processor's name."""
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
