"""Scores per second against this machine's matrix products, with one worker and with two.

    python -m tests.benchmarks.attribution.search RUN [--queries 1000] [--workers 1,2] [--rounds 3]

RUN is a run whose features are written. Its own test rows are scored against all training rows ``by: kernel``, anew
each time, with each number of workers in turn; before and after each, products of the same shape are timed with as many
threads, so that what else the machine does is in both. Printed: seconds of the search and of the whole command,
operations a second over those of the products, and by how much two workers are faster than one.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np
import torch

from fisher_ray import attribution
from fisher_ray.store import open_features


def product_rate(num_queries: int, rows: int, width: int, threads: int) -> float:
    """Return the operations a second of products of blocks."""
    left, right = torch.randn(num_queries, width), torch.randn(rows, width)
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        left @ right.T
        seconds.append(time.perf_counter() - start)
    return 2.0 * num_queries * rows * width / min(seconds)


def main() -> None:
    """Measure, and print a line for each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    store = open_features(f"{options.run}/features/train.zarr")
    width = int(np.prod(store.layout("features").shape[1:]))
    work = 2.0 * options.queries * store.num_rows * width
    print(f"{options.queries} queries x {store.num_rows} rows x {width} columns: {work / 1e12:.2f} T operations")
    counts = [int(number) for number in options.workers.split(",")]
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in counts}
    for _ in range(options.rounds):
        for number in counts:
            before = product_rate(options.queries, 2048, width, number)
            start = time.perf_counter()
            answer = attribution.score(
                options.run,
                rows=(0, options.queries),
                name="benchmark",
                fresh=True,
                overrides=[f"runtime.num_workers={number}"],
            )
            whole = time.perf_counter() - start
            rate = (before + product_rate(options.queries, 2048, width, number)) / 2
            seconds = answer["seconds"]["search/0"]
            share = work / seconds / rate
            found[number].append((seconds, share))
            print(
                f"{number} workers: search {seconds:.1f} s, whole {whole:.1f} s, {work / seconds / 1e9:.0f} G/s, "
                f"{100 * share:.0f} % of {rate / 1e9:.0f} G/s",
                flush=True,
            )
    for number, values in found.items():
        print(f"{number} workers: {median(s for s, _ in values):.1f} s, {100 * median(p for _, p in values):.0f} %")
    if len(counts) == 2:
        ratios = [one[0] / two[0] for one, two in zip(*found.values(), strict=True)]
        print(f"{counts[1]} workers over {counts[0]}: {median(ratios):.2f}")


if __name__ == "__main__":
    main()
