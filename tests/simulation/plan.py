"""What a seed draws: a run's size and settings, and the trouble that is in store for it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from tests.simulation.actors import DIE, How

NO = ZeroDivisionError("no")
KINDS = ("die", "fail", "slow", "hang", "bad start", "lost sum", "corrupt")
"""What may happen to any piece of work, or start, by itself."""


@dataclass(frozen=True)
class Outage:
    """A time in which storage is slow, or refuses.

    Attributes:
        start_s: its beginning.
        stop_s: its end.
        refuses: whether nothing goes through.
    """

    start_s: float
    stop_s: float
    refuses: bool


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        num_rows: of each pass.
        unit_rows: of a unit.
        num_workers: as configured.
        num_machines: at the start.
        slots: workers that a machine has room for.
        num_zones: of the machines.
        max_attempts: as configured.
        unit_timeout_s: as configured.
        wait_s: as configured.
        skips: whether broken rows are left out.
        kept_level: from which on sums are kept; None for none.
        linger_s: of processes that were killed.
        overtakes: whether a worker may begin with its second unit.
        odds: of what may happen to a piece of work.
        broken: rows that kill their worker, or fail.
        tough: the share of workers that live through them.
        toil: how many times as long that takes.
        outages: of storage.
        turns: what happens to machines, and when.
        kills_s: after how many seconds a driver is killed, one after the other.
        num_troubled: drivers for which there is trouble; then it is quiet, so that the run can end.
    """

    num_rows: int
    unit_rows: int
    num_workers: str
    num_machines: int
    slots: int
    num_zones: int
    max_attempts: int
    unit_timeout_s: int
    wait_s: int
    skips: bool
    kept_level: int | None
    linger_s: float
    overtakes: bool
    odds: dict[str, float]
    broken: dict[int, How]
    tough: float
    toil: float
    outages: tuple[Outage, ...]
    turns: tuple[tuple[float, str], ...]
    kills_s: tuple[float, ...]
    num_troubled: int

    @property
    def overrides(self) -> tuple[str, ...]:
        """The configuration's."""
        return (
            f"runtime.num_workers={self.num_workers}",
            f"runtime.max_attempts={self.max_attempts}",
            f"runtime.unit_timeout_s={self.unit_timeout_s}",
            f"runtime.wait_s={self.wait_s}",
            f"data.on_error={'skip' if self.skips else 'stop'}",
        )


def draw(chance: random.Random) -> Plan:
    """Draw a run: of every kind of trouble, there is none in half of them; some runs are of a kind."""
    plan, kind = _any(chance), chance.random()
    if kind < 0.1:  # long, on few workers: what is held grows if it can
        return replace(plan, num_rows=96, unit_rows=1, num_workers=chance.choice(["1", "2"]))
    if kind < 0.2:  # slow workers that live through rows by which others fail
        broken: dict[int, How] = {row: NO for row in range(40) if chance.random() < 0.1}
        odds = {**dict.fromkeys(KINDS, 0.0), "slow": 0.02}
        sizes: dict[str, Any] = {"num_rows": 40, "unit_rows": 2, "num_machines": 6, "num_workers": "auto"}
        return replace(plan, broken=broken, odds=odds, tough=0.3, toil=20.0, max_attempts=3, **sizes)
    return plan


def _any(chance: random.Random) -> Plan:
    num_rows, unit_rows = chance.choice([8, 16, 23, 40, 40, 96]), chance.choice([1, 2, 4, 8])
    share = chance.choice([0, 0, 0.03, 0.1])
    num_machines = chance.randint(1, 5)
    many = chance.random() < 0.3
    return Plan(
        num_rows=num_rows,
        unit_rows=unit_rows,
        num_workers=chance.choice(["auto", "auto", "1", "2", "3", "5"]),
        num_machines=num_machines,
        slots=chance.choice([1, 1, 2]),
        num_zones=chance.choice([1, 2, 3]),
        max_attempts=chance.choice([3, 3, 6, 20]),
        unit_timeout_s=chance.choice([30, 100]),
        wait_s=chance.choice([40, 120, 600]),
        skips=chance.random() < 0.8,
        kept_level=chance.choice([None, 0, 1, 2]),
        linger_s=chance.choice([0.0, 3.0]),
        overtakes=chance.random() < 0.5,
        odds={kind: chance.choice([0, 0, 0.02, 0.1, 0.25]) for kind in KINDS},
        broken={row: chance.choice([DIE, NO]) for row in range(num_rows) if chance.random() < share},
        tough=chance.choice([0, 0, 0.4]),
        toil=1.0,
        outages=tuple(_outage(chance) for _ in range(chance.choice([0, 0, 1, 3]))),
        turns=tuple(sorted(_turn(chance, num_machines) for _ in range(chance.choice([0, 0, 2, 12 if many else 6])))),
        kills_s=tuple(chance.uniform(1, 60) for _ in range(chance.choice([0, 0, 1, 3]))),
        num_troubled=chance.randint(2, 5),
    )


def _outage(chance: random.Random) -> Outage:
    start_s = chance.uniform(0, 80)
    return Outage(start_s, start_s + chance.choice([3.0, 20.0, 150.0]), chance.random() < 0.5)


def _turn(chance: random.Random, num_machines: int) -> tuple[float, str]:
    kinds = ["machine lost", "machine lost", "machine comes", "machine comes", "zone lost"]
    return round(chance.uniform(0, 90), 3), chance.choice(kinds)
