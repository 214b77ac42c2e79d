"""Whether compressed per-sample gradients stand for exact ones: the correlation of their dot products with those.

    python -m tests.benchmarks.gradients.agreement [W1 W2 W3]

A row for each method: numbers for each sample, correlation over pairs of different samples. Ends with an error where
rows are not the samples' or the correlation is not above one half; projections' noise leaves it below one.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from tests.benchmarks.gradients.methods import exact, projected, projected_linear
from tests.benchmarks.gradients.peers import bergson, dattri, logix
from tests.benchmarks.gradients.workloads import workload

LEAST = 0.5
COMPRESSED = (projected, projected_linear, dattri, logix, bergson)


def rows_of(found: Tensor | list[Tensor]) -> Tensor:
    """Return what a method made as ``(B, D)``."""
    layers = [found] if isinstance(found, Tensor) else found
    return torch.cat([layer.detach().flatten(1) for layer in layers], dim=1)


def pairs(rows: Tensor) -> Tensor:
    """Return the dot products of all pairs of different rows."""
    above = torch.triu_indices(len(rows), len(rows), 1)
    return (rows.double() @ rows.double().T)[above[0], above[1]]


def check(name: str) -> list[str]:
    """Print one workload's agreement and return what is wrong with it."""
    work, wrong = workload(name), []
    expected = pairs(rows_of(exact(work)()))
    for method in COMPRESSED:
        if (run := method(work)) is None:
            continue
        run()
        rows = rows_of(run())
        correlation = torch.corrcoef(torch.stack([expected, pairs(rows)]))[0, 1].item()
        print(f"{name}  {method.__name__:18} {tuple(rows.shape)!s:16} {correlation:6.3f}")
        if len(rows) != len(work.inputs) or not correlation > LEAST:
            wrong.append(f"{name} {method.__name__}")
    return wrong


if __name__ == "__main__":
    failed = [item for name in sys.argv[1:] or ("W1", "W2", "W3") for item in check(name)]
    if failed:
        sys.exit(f"do not agree with exact gradients: {', '.join(failed)}")
