"""A world in which work, networks, storage and the driver's decisions take their time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import ray.exceptions

from fisher_ray.runtime.tree import Node
from tests.simulation.actors import Actor, Asked, Outcome
from tests.simulation.machines import Fleet, Machine
from tests.simulation.scale.costs import Scenario
from tests.simulation.scale.lines import Line, Network, ObjectStorage, move
from tests.simulation.sums import Checkpoints
from tests.simulation.world import World

PRIME = 2**61 - 1


class Costly(World):
    """See the module. A sum is the number of its rows, and a number that depends on the tree.

    Args:
        scenario: what costs what.
        seed: of what happens.
        limit_s: when the simulation is given up.

    Attributes:
        driver_s: what the driver was busy for.
        counts: pieces of work, by kind, and the like.
        own_s: real seconds of the driver's own code, if measured.
    """

    def __init__(self, scenario: Scenario, seed: int = 0, limit_s: float = 1e6) -> None:
        super().__init__(seed, limit_s)
        costs = self.costs = scenario.costs
        self.at_once, self.fleet = 2, Fleet()
        self.files = ObjectStorage(
            costs.storage_bytes_s, costs.storage_requests_s, costs.storage_latency_s,
            costs.stream_bytes_s, costs.part_bytes,
        )  # fmt: skip
        self.networks: dict[int, Network] = {}
        self._starts = Line(costs.starts_s)
        self.driver_s, self.counts = 0.0, Counter[str]()
        self.own_s, self._left_s = 0.0, time.perf_counter()
        self.num_scanned, self.moved_bytes = 0, 0.0
        left = scenario.num_workers
        while left > 0:
            self.fleet.add(len(self.fleet.machines) % 3, min(left, costs.gpus_each))
            left -= costs.gpus_each
        for machine in self.fleet.machines:
            self._doom(machine)
        if scenario.zone_lost_s is not None:
            self.after(scenario.zone_lost_s, lambda: self._lose_zone(scenario.zone_back_s))

    # -- the driver's own time

    def enter(self) -> None:
        """The driver's code calls the world."""
        self.own_s += time.perf_counter() - self._left_s

    def leave(self) -> None:
        """The world returns to the driver's code."""
        self._left_s = time.perf_counter()

    def charge(self, seconds: float) -> None:
        self.driver_s += seconds
        self.spend(seconds)

    def wait(self, refs: Sequence[Any], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Any], list[Any]]:
        self.enter()
        self.charge(len(refs) * self.costs.ref_s)
        if num_returns == 1 and timeout:  # once a round
            self.num_scanned += len(refs)
            self.counts["rounds"] += 1
            self.charge(len(refs) / 2 * self.costs.scan_s)
        found = super().wait(refs, num_returns, timeout)
        self.leave()
        return found

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        self.enter()
        try:
            self.charge(self.costs.get_s)
            return super().get(ref, timeout)
        finally:
            self.leave()

    def call(self, actor: Actor, name: str, arguments: tuple[Any, ...], refs: list[Any]) -> None:
        self.enter()
        self.counts[name] += 1
        own_s = 0.0 if name in ("ready", "live") else self.costs.decide_s
        self.charge(self.costs.call_s + own_s)
        super().call(actor, name, arguments, refs)
        self.leave()

    def _start(self) -> Actor:
        self.enter()
        self.charge(self.costs.call_s)
        actor = super()._start()
        self.leave()
        return actor

    # -- workers

    def begin(self, number: int) -> Outcome:
        machine = self.actors[number - 1].machine
        ready_s = self._starts.take(self.now, 1.0) + self.costs.start_s * self.chance.uniform(0.9, 1.1)
        loaded_s = self.files.end_s(self.now, self._network(machine).inward, self.costs.model_bytes)
        return max(ready_s, loaded_s) - self.now, "ok"

    def work(self, asked: Asked) -> Iterator[Any]:
        """Do a piece of work, step by step."""
        steps = {"run": self._run, "merge": self._merge, "restore": self._restore, "solo": self._solo}
        yield from steps[asked.name](asked)
        return "ok"

    def _run(self, asked: Asked) -> Iterator[Any]:
        costs, network, num_rows = self.costs, self._network(asked.actor.machine), len(asked.unit)
        yield self._until(self.files.end_s(self.now, network.inward, num_rows * costs.input_bytes))
        yield asked.actor.turn
        slow = costs.slow_ratio if self.chance.random() < costs.slow_share else 1.0
        yield num_rows / costs.samples_s * slow * self.chance.lognormvariate(0.0, costs.wobble)
        asked.actor.turn.release()
        written = num_rows * costs.feature_bytes if asked.stage == "features" else 0.0
        if asked.keep is not None:
            written += costs.sum_bytes
        if written:
            yield self._until(self.files.end_s(self.now, network.outward, written))

    def _merge(self, asked: Asked) -> Iterator[Any]:
        costs, machine = self.costs, asked.actor.machine
        network = self._network(machine)
        yield asked.actor.turn
        there = self.now
        for ref in asked.inputs:
            source = ref.home.machine
            if source is not machine:
                self.moved_bytes += costs.sum_bytes
                end = move(self.now, costs.sum_bytes, self._network(source), network)
                there = max(there, end + costs.machine_latency_s)
        yield self._until(there)
        yield costs.sum_bytes / costs.add_bytes_s
        if asked.keep is not None:
            yield self._until(self.files.end_s(self.now, network.outward, costs.sum_bytes))
        asked.actor.turn.release()

    def _restore(self, asked: Asked) -> Iterator[Any]:
        line = self._network(asked.actor.machine).inward
        yield self._until(self.files.end_s(self.now, line, self.costs.sum_bytes))

    def _solo(self, asked: Asked) -> Iterator[Any]:
        yield self.costs.solo_s

    def _value(self, asked: Asked) -> Any:
        if asked.name == "run":
            return len(asked.unit), asked.unit.index + 1
        if asked.name == "restore":
            return self.storage[asked.keep]
        if any(ref.lost for ref in asked.inputs):
            raise ray.exceptions.ObjectLostError("0", None, "")
        return joined([ref.value for ref in asked.inputs])

    def _until(self, end: float) -> float:
        return max(0.0, end - self.now)

    # -- machines

    def _network(self, machine: Any) -> Network:
        if machine.number not in self.networks:
            self.networks[machine.number] = Network(self.costs.machine_bytes_s)
        return self.networks[machine.number]

    def _doom(self, machine: Machine) -> None:
        if self.costs.loss_each_s:
            self.after(self.chance.expovariate(self.costs.loss_each_s), lambda: self._lose(machine))

    def _lose(self, machine: Machine, back_s: float | None = None) -> None:
        if machine.gone:
            return
        self.counts["lost machines"] += 1
        self.fleet.lose(machine)
        self.after(back_s or self.costs.replace_s, lambda: self._doom(self.fleet.add(machine.zone, machine.slots)))

    def _lose_zone(self, back_s: float) -> None:
        for machine in self.fleet.living:
            if machine.zone == 0:
                self._lose(machine, back_s)


class KeptSums(Checkpoints):
    """Sums on the world's storage, which threads of the driver's remove."""

    _world: Costly

    def remove(self, nodes: list[Node]) -> None:
        world = self._world
        world.enter()
        world.counts["removed"] += len(nodes)
        world.charge(len(nodes) * world.costs.remove_s)
        super().remove(nodes)
        world.leave()


def joined(sums: list[tuple[int, int]]) -> tuple[int, int]:
    """Merge sums; the second number depends on the order."""
    if len(sums) == 1:
        return sums[0]
    (rows, mark), (other_rows, other_mark) = sums
    return rows + other_rows, (31 * mark + 17 * other_mark) % PRIME
