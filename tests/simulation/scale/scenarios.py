"""What is simulated: more and more workers, and one size under all kinds of trouble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tests.simulation.scale.costs import Costs, Scenario

EVERY_UNITS = 64
ONE_SIZE = 1024
ZONE_LOST_S = 32.0


def growing(costs: Costs, num_workers: Sequence[int], num_rows: int, unit_rows: int) -> list[Scenario]:
    """The same rows on more and more workers."""
    name = f"{num_rows:.0e} rows".replace("e+0", "e")
    return [Scenario(name, number, num_rows, unit_rows, EVERY_UNITS, costs) for number in num_workers]


def unit_sizes(costs: Costs, num_rows: int, sizes: Sequence[int]) -> list[Scenario]:
    """Units of several sizes, on one number of workers."""
    return [Scenario(f"units of {rows} rows", ONE_SIZE, num_rows, rows, EVERY_UNITS, costs) for rows in sizes]


def troubled(costs: Costs, num_rows: int, unit_rows: int) -> list[Scenario]:
    """One number of workers, and everything that may be otherwise."""
    plain = Scenario("nothing is lost", ONE_SIZE, num_rows, unit_rows, EVERY_UNITS, replace(costs, loss_each_s=0.0))

    def other(name: str, **changes: float) -> Scenario:
        return replace(plain, name=name, costs=replace(plain.costs, **changes))

    def slower(ratio: int) -> Scenario:
        name = f"{costs.samples_s / ratio:,.0f} samples a second, units of {unit_rows // ratio:,} rows"
        return other(name, samples_s=costs.samples_s / ratio, loss_each_s=costs.loss_each_s)

    large = {"samples_s": 100.0, "model_bytes": 4e9, "sum_bytes": 8e9, "solo_s": 600.0}
    return [
        plain,
        replace(plain, name="a zone is lost", zone_lost_s=ZONE_LOST_S),
        replace(plain, name="every 8 units' sum is kept", every_units=8),
        replace(plain, name="no sum is kept", every_units=None),
        other("sums of no size", sum_bytes=1.0),
        other("1 % of units take thrice as long", slow_share=0.01, slow_ratio=3.0),
        other("storage of 50 GB/s, 3,500 requests/s", storage_bytes_s=5e10, storage_requests_s=3500.0),
        other("0.5 ms for a call", call_s=0.0005),
        *(replace(slower(n), unit_rows=unit_rows // n) for n in (2, 4)),
        replace(other("1e9 parameters", **large), num_rows=num_rows // 10, unit_rows=unit_rows // 4),
    ]
