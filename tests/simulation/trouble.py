"""A world in which what a plan says happens, that writes down what does."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray.exceptions

from fisher_ray.errors import StorageError, StoreError
from fisher_ray.runtime.drive import LEFTOVER_S
from fisher_ray.runtime.worker import IN_FLIGHT
from tests.simulation.actors import DIE, STOP, Actor, Asked, How, Outcome
from tests.simulation.invariants import BOUNDED, check
from tests.simulation.machines import Fleet
from tests.simulation.plan import Plan
from tests.simulation.world import World

BAD_LUCK = RuntimeError("bad luck")
REFUSED, CORRUPT = StorageError("storage refuses"), StoreError("corrupt")
PATIENCE_S = 60.0
"""How long a worker tries to reach storage that refuses."""


class Troubled(World):
    """See the module.

    Args:
        seed: of what happens.
        plan: what may.

    Attributes:
        events: what happened, a line each.
        troubled: whether anything may go wrong.
        counts: of what went wrong, by kind.
        written: features, by unit and half: what readers would see.
        unresolved: how often a row was tried alone, and nothing came back.
    """

    def __init__(self, seed: int, plan: Plan) -> None:
        super().__init__(seed, 0.0, plan.linger_s, plan.overtakes)
        self.seed, self.plan, self.troubled = seed, plan, True
        self.events: list[str] = []
        self.counts: Counter[str] = Counter()
        self.written: dict[tuple[int, int], list[int]] = {}
        self.unresolved: Counter[tuple[str, int]] = Counter()
        self.fleet = Fleet()
        for _ in range(plan.num_machines):
            self._add_machine()
        for seconds, kind in plan.turns:
            self.after(seconds, lambda kind=kind: self._turn(kind))

    def log(self, text: str) -> None:
        self.events.append(f"{self.now:9.3f} {text}")

    def grant(self, seconds: float) -> None:
        """Let the run take so much longer: it may, for what has happened."""
        self.limit_s += seconds

    def calm_down(self) -> None:
        """Let nothing go wrong from now on, and have as many machines as at first."""
        self.troubled = False
        while len(self.fleet.living) < self.plan.num_machines:
            self._add_machine()

    def excused(self, stage: str) -> list[int]:
        """Rows that may be blamed, although they are not broken."""
        least = self.plan.max_attempts
        return [row for (at, row), number in self.unresolved.items() if at == stage and number >= least]

    # -- workers

    def begin(self, number: int) -> Outcome:
        seconds, bad = self.chance.uniform(1, 5), self._happens("bad start")
        self.grant(seconds + (70.0 if bad else 0.0))
        hangs = bad and self.chance.random() < 0.2
        self.log(f"worker {number} starts on machine {self.actors[number - 1].machine.number}{', badly' * bad}")
        if hangs:
            self.grant(self.plan.wait_s)
            return None, "ok"
        return seconds, DIE if bad else "ok"

    def asked(self, actor: Actor, asked: Asked) -> None:
        if asked.task == "probe" and len(asked.unit) == 1:
            self.unresolved[asked.stage, asked.unit.start] += 1
        check(BOUNDED, actor.num_asked <= IN_FLIGHT, f"worker {actor.number} has {actor.num_asked} pieces of work")

    def ended(self, actor: Actor, linger_s: float) -> None:
        self.counts["deaths"] += 1
        self.log(f"worker {actor.number} dies")
        super().ended(actor, linger_s)

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        check(BOUNDED, not getattr(ref, "is_sum", False), "the driver fetches a sum")
        return super().get(ref, timeout)

    def work(self, asked: Asked) -> Iterator[Any]:
        """Do what a worker is asked to, with what goes wrong."""
        seconds = self.chance.uniform(0.5, 3) * (20 if self._happens("slow") else 1)
        if asked.task == "task" and self._is_tough(asked.worker) and self._has_broken(asked):
            seconds *= self.plan.toil
        self.grant(seconds)
        what = asked.name
        if asked.name == "run":
            what = f"{asked.task} of {asked.stage} [{asked.unit.start}, {asked.unit.stop})"
        self.log(f"worker {asked.worker} begins {what}, {seconds:.3f} s")
        if self._happens("hang"):
            self.grant(2 * self.plan.unit_timeout_s + 3 * LEFTOVER_S)
            yield STOP if asked.name == "solo" or self.chance.random() < 0.5 else None  # a solo may take for ever
        if self._happens("lost sum"):
            self.after(seconds / 2, self._lose_one)
        dies_at = self.chance.randint(0, 2) if self._happens("die") else None
        how = yield from self._do(asked, seconds, dies_at)
        tells = how != DIE and how == self.plan.broken.get(asked.unit.start, "ok") and not asked.actor.dead
        if asked.task == "probe" and len(asked.unit) == 1 and tells:
            self.unresolved[asked.stage, asked.unit.start] -= 1
        self.log(f"worker {asked.worker} ends {what}: {how}")
        return how

    def _do(self, asked: Asked, seconds: float, dies_at: int | None) -> Iterator[Any]:
        writes = asked.stage == "features" and asked.task == "task"
        if asked.name in ("run", "restore") and (error := (yield from self._reach_storage())):
            return error
        if asked.name == "restore" and self._happens("corrupt"):
            return CORRUPT
        if self._has_broken(asked) and not self._is_tough(asked.worker):
            yield seconds / 2
            return next(self.plan.broken[row] for row in asked.rows if row in self.plan.broken)
        if dies_at == 0:
            return DIE
        yield seconds / 2
        if writes:
            self._write(asked, 0)
        if dies_at == 1:
            return DIE
        yield seconds / 2
        if (writes or asked.keep is not None) and (error := (yield from self._reach_storage())):
            return error
        if writes:
            self._write(asked, 1)
        if dies_at == 2:
            if asked.name != "restore" and asked.keep is not None and not any(ref.lost for ref in asked.inputs):
                self.compute(asked)
            return DIE
        return self._bad_luck(asked)

    def _is_tough(self, worker: int) -> bool:
        return self.troubled and random.Random(f"{self.seed} {worker}").random() < self.plan.tough

    def _has_broken(self, asked: Asked) -> bool:
        return asked.name == "run" and any(row in self.plan.broken for row in asked.rows)

    def _bad_luck(self, asked: Asked) -> How:
        fails = asked.name != "solo" and self._happens("fail")
        return BAD_LUCK if fails else "ok"

    def _write(self, asked: Asked, half: int) -> None:
        """Put half of a unit's rows, whole."""
        middle = asked.unit.start + len(asked.unit) // 2
        self.written[asked.unit.index, half] = [row for row in asked.rows if (row >= middle) == bool(half)]

    def _happens(self, kind: str) -> bool:
        happens = self.chance.random() < self.plan.odds[kind] and self.troubled
        self.counts[kind] += happens
        return happens

    # -- storage and machines

    def _reach_storage(self) -> Iterator[Any]:
        """Wait for storage; return the error if it refuses for too long."""
        given_up_s = self.now + PATIENCE_S
        while self.troubled and (outage := self._outage()) is not None:
            if not outage.refuses:
                self.grant(5.0)
                yield 5.0
                return None
            if self.now >= given_up_s:
                self.counts["refused"] += 1
                return REFUSED
            pause_s = max(0.001, min(outage.stop_s, given_up_s) - self.now)
            self.grant(pause_s)
            yield pause_s
        return None

    def _outage(self) -> Any:
        return next((found for found in self.plan.outages if found.start_s <= self.now < found.stop_s), None)

    def _turn(self, kind: str) -> None:
        if not self.troubled:
            return
        living = self.fleet.living
        if kind == "machine comes":
            self._add_machine()
        elif living:
            first = self.chance.choice(living)
            for machine in [m for m in living if m is first or (kind == "zone lost" and m.zone == first.zone)]:
                self.log(f"machine {machine.number} is lost")
                self.counts["lost machines"] += 1
                self.fleet.lose(machine)

    def _add_machine(self) -> None:
        zone = len(self.fleet.machines) % self.plan.num_zones
        machine = self.fleet.add(zone, self.plan.slots)
        self.log(f"machine {machine.number} comes, in zone {zone}")

    def _lose_one(self) -> None:
        """Lose the process of a worker, with what it made."""
        actor = self.chance.choice(self.actors)
        actor.die()
        actor.lose()

    def compute(self, asked: Asked) -> Any:
        try:
            return super().compute(asked)
        except ray.exceptions.ObjectLostError:
            self.counts["lost inputs"] += 1
            raise
