"""Units of work, fixed by the configuration alone: never by how many workers there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from fisher_ray.records import Unit


def plan_units(num_rows: int, unit_rows: int) -> list[Unit]:
    """Cut ``num_rows`` into consecutive units of ``unit_rows``; the last may be shorter.

    Raises:
        ValueError: if ``num_rows`` is negative or ``unit_rows`` is not positive.
    """
    if num_rows < 0 or unit_rows <= 0:
        raise ValueError(f"cannot cut {num_rows} rows into units of {unit_rows}; rows >= 0, unit_rows > 0")
    starts = range(0, num_rows, unit_rows)
    return [Unit(i, start, min(start + unit_rows, num_rows)) for i, start in enumerate(starts)]


def choose_units(units: Sequence[Unit], fraction: float) -> list[Unit]:
    """Return ``ceil(fraction · len(units))`` of ``units``, evenly spread, in order; always the same ones.

    Raises:
        ValueError: if ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is not in (0, 1]")
    # The decimal that was written, not its binary neighbour: 0.07 of 100 units is 7, not 8.
    num_chosen = math.ceil(Fraction(repr(float(fraction))) * len(units))
    return [units[(2 * i + 1) * len(units) // (2 * num_chosen)] for i in range(num_chosen)]
