"""Ridge in closed form: seconds of the sums and of a whole path of penalties, and the difference to scikit-learn's.

``python -m tests.benchmarks.linear [--rows 25000] [--columns 10240] [--penalties 20]``; scikit-learn fits one penalty
of the path, on the same standardised rows in float64, by Cholesky.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from fisher_ray.linear import GramSum, ridge_path

NUM_CLASSES = 10


def make_rows(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Return rows whose columns are correlated, with a spectrum like features', and labels that depend on them."""
    generator = torch.Generator().manual_seed(0)
    inner = min(num_columns, 512)
    mixing = torch.randn(inner, num_columns, generator=generator) * torch.logspace(0, -2, inner)[:, None]
    hidden = torch.randn(num_rows, inner, generator=generator)
    x = torch.randn(num_rows, num_columns, generator=generator).mul_(0.3).addmm_(hidden, mixing)
    scores = hidden @ torch.randn(inner, NUM_CLASSES, generator=generator) / inner**0.5
    noise = torch.randn(num_rows, NUM_CLASSES, generator=generator)
    return x, (scores + noise).argmax(1)


def compare_with_sklearn(x: Tensor, labels: Tensor, penalty: float, weight: Tensor) -> tuple[float, float]:
    """Return scikit-learn's seconds for one penalty, and the relative difference of the standardised weights."""
    rows = x.numpy().astype(np.float64)
    deviation = rows.std(0)
    rows -= rows.mean(0)
    rows /= deviation
    targets = np.eye(NUM_CLASSES)[labels.numpy()]
    start = time.perf_counter()
    fitted = Ridge(alpha=penalty * len(rows), solver="cholesky", copy_X=False).fit(rows, targets)
    seconds = time.perf_counter() - start
    own = weight.numpy() * deviation
    return seconds, float(np.linalg.norm(own - fitted.coef_) / np.linalg.norm(fitted.coef_))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Ridge regression in closed form, beside scikit-learn.")
    parser.add_argument("--rows", type=int, default=25_000)
    parser.add_argument("--columns", type=int, default=10_240)
    parser.add_argument("--penalties", type=int, default=20)
    given = parser.parse_args()
    x, labels = make_rows(given.rows, given.columns)
    penalties = np.geomspace(0.01, 20, given.penalties).tolist()
    start = time.perf_counter()
    sums = GramSum.zeros(given.columns, NUM_CLASSES)
    sums.add(x, labels)
    summed_s = time.perf_counter() - start
    start = time.perf_counter()
    models = ridge_path(sums, penalties)
    path_s = time.perf_counter() - start
    start = time.perf_counter()
    ridge_path(sums, penalties[:1])
    one_s = time.perf_counter() - start
    del sums
    print(f"{given.rows:,} rows, {given.columns:,} columns, {torch.get_num_threads()} threads", flush=True)
    print(f"sums {summed_s:.1f} s, path of {given.penalties} {path_s:.1f} s, together {summed_s + path_s:.1f} s")
    print(f"a path of one: {one_s:.1f} s", flush=True)
    middle = given.penalties // 3
    seconds, difference = compare_with_sklearn(x, labels, penalties[middle], models[middle].weight)
    print(f"scikit-learn, one penalty, {penalties[middle]:.3g}: {seconds:.1f} s; weights differ by {difference:.1e}")


if __name__ == "__main__":
    main()
