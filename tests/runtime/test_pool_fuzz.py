"""Passes over units on simulated workers that die, fail, hang, are slow, and lose what they made."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fisher_ray.data import plan_units
from fisher_ray.errors import DataError, WorkersLostError
from fisher_ray.runtime.drive import LEFTOVER_S
from tests.runtime.simulated import DIE, HANG, STOP, Asked, Checkpoints, Outcome, World, let_pass, merged, simulated

NO = ZeroDivisionError("no")


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_the_sums_are_the_same_or_the_run_stops(seed):
    world = World(seed, limit_s=3e5, linger_s=3.0, overtakes=seed % 2 == 0)
    chance = world.chance
    num_rows, unit_rows = chance.choice([8, 16, 23, 40]), chance.choice([2, 4, 8])
    share = chance.choice([0, 0.03, 0.1])
    poison = {row: chance.choice([DIE, NO]) for row in range(num_rows) if chance.random() < share}
    kinds = ("die", "fail", "slow", "hang", "start", "lose")
    odds = {kind: chance.choice([0, 0, 0.02, 0.1, 0.25]) for kind in kinds}
    tough = {number for number in range(1000) if chance.random() < chance.choice([0, 0.4])}

    def happens(kind: str) -> bool:
        return chance.random() < odds[kind]

    def start(number: int) -> Outcome:
        return chance.uniform(1, 5), DIE if happens("start") else "ok"

    def behave(asked: Asked) -> Outcome:
        seconds = chance.uniform(0.5, 3) * (20 if happens("slow") else 1)
        if happens("hang"):
            return HANG, chance.choice(["ok", STOP])
        if happens("lose"):
            actor = chance.choice(world.actors)
            world.after(seconds / 2, lambda: (actor.die(), actor.lose())[1])
        if asked.name == "run" and asked.worker not in tough and (bad := [row for row in asked.rows if row in poison]):
            return seconds, poison[bad[0]]
        if happens("die"):
            return seconds, DIE
        return seconds, RuntimeError("bad luck") if happens("fail") else "ok"

    overrides = [
        f"runtime.num_workers={chance.choice([1, 2, 3, 5])}",
        f"runtime.max_attempts={chance.choice([3, 6, 50])}",
    ]
    overrides += [
        f"runtime.unit_timeout_s={chance.choice([30, 100])}",
        f"data.on_error={chance.choice(['skip', 'stop'])}",
    ]
    level = chance.choice([None, 0, 1, 2])
    kept: Any = None if level is None else Checkpoints(world, level)
    with simulated(world, behave, start, *overrides) as (pool, crew):
        for _ in range(2):
            world.storage.clear()
            heard, excluded, units = Counter[int](), dict[int, str](), plan_units(num_rows, unit_rows)
            try:
                total = pool.reduce(
                    "metric", "task", units, lambda receipt, heard=heard: heard.update([receipt.unit.index]),
                    probe="probe", checkpoints=kept, on_excluded=excluded.update,
                )  # fmt: skip
            except (DataError, WorkersLostError):
                return
            rows = [[row for row in range(unit.start, unit.stop) if row not in excluded] for unit in units]
            assert total.refs[0].value == merged([str(found) for found in rows])
            assert heard == Counter(range(len(units)))
            assert total.given.schedule._running == Counter()
            let_pass(world, crew, 2 * LEFTOVER_S)
            for node, value in world.storage.items():
                below = rows[node.first_unit : node.first_unit + (1 << node.level)]
                assert value == merged([str(found) for found in below])
