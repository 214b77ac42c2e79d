"""Ranges, normalised gradients, class gaps and weighted kernels, entry by entry and pair by pair.

A row is a dictionary from coordinate to entry: what is not in it was left out.
"""

from __future__ import annotations

import math

Row = dict[int, float]


def ranges(rows: list[Row], dim: int) -> tuple[list[float], list[float], list[int]]:
    """Smallest and largest entry of each coordinate, and how many there are; zero and one for none."""
    columns = [[row[j] for row in rows if j in row] for j in range(dim)]
    return (
        [min(column) if column else 0.0 for column in columns],
        [max(column) if column else 1.0 for column in columns],
        [len(column) for column in columns],
    )


def normalised(row: Row, smallest: list[float], largest: list[float], power: float | None, l2: bool) -> Row:
    """One row, scaled to its coordinates' ranges, its absolute values raised to the power, its length made one."""
    result = {}
    for j, entry in row.items():
        width = largest[j] - smallest[j]
        n = (entry - smallest[j]) / (1 if width == 0 else width)
        if power is not None:
            n = math.copysign(abs(n) ** power, n)
        result[j] = n
    length = math.hypot(*result.values()) if l2 else 1
    return {j: n / length if length > 0 else n for j, n in result.items()}


def gap(column: list[float], labels: list[int]) -> float:
    """Mean product of two entries of one class minus that of entries of two classes, over all pairs."""
    within, between = [], []
    for i in range(len(column)):
        for k in range(i):
            (within if labels[i] == labels[k] else between).append(column[i] * column[k])
    return math.fsum(within) / len(within) - math.fsum(between) / len(between)


def weighted_product(a: Row, b: Row, weights: Row) -> float:
    """``Σ_j w_j a_j b_j``, what was left out being zero."""
    return math.fsum(weight * a.get(j, 0.0) * b.get(j, 0.0) for j, weight in weights.items())
