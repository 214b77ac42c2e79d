"""The clock, the workers and the storage, in the place of Ray's module and of ``time``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ray.exceptions

from fisher_ray.errors import StoreError
from fisher_ray.runtime.tree import Node
from tests.simulation.actors import Actor, Asked, Behave, Outcome
from tests.simulation.clock import Clock
from tests.simulation.machines import Fleet
from tests.simulation.results import Awaited


class World(Clock):
    """Units' sums are lists of their rows, as text, and a merge's the expression that made it.

    Args:
        seed: of ``chance``.
        limit_s: when the simulation is given up.
        linger_s: how long the process of a worker that was killed goes on with its work.
        overtakes: whether a worker with two units may begin with the second.

    Attributes:
        at_once: pieces of work that a worker does at a time.
        fleet: the machines; None for one without end.
    """

    exceptions = ray.exceptions

    def __init__(self, seed: int = 0, limit_s: float = 1e6, linger_s: float = 0.0, overtakes: bool = False) -> None:
        super().__init__(limit_s)
        self.linger_s, self.overtakes, self.at_once = linger_s, overtakes, 1
        self.chance = random.Random(seed)
        self.actors: list[Actor] = []
        self.fleet: Fleet | None = None
        self.storage: dict[Node, Any] = {}
        self.resources = {"CPU": 64.0}
        self.behave: Behave = lambda asked: (1.0, "ok")
        self.start: Callable[[int], Outcome] = lambda number: (1.0, "ok")

    # -- as Ray's module

    def wait(self, refs: Sequence[Any], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Any], list[Any]]:
        end, came = self.now + timeout, [ref for ref in refs if ref.done]
        while len(came) < num_returns and (self.now < end or self.is_due(end)):
            before = Awaited.num_came
            self.pass_until(end)
            if Awaited.num_came != before:
                came = [ref for ref in refs if ref.done]
        return came[:num_returns], [ref for ref in refs if not ref.done] + came[num_returns:]

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        if isinstance(ref, list):
            return [self.get(item) for item in ref]
        if not ref.done:
            raise ray.exceptions.GetTimeoutError("not yet")
        if ref.error is not None:
            raise ref.error
        return ref.value

    def kill(self, handle: Actor) -> None:
        handle.die(self.linger_s)

    def cluster_resources(self) -> dict[str, float]:
        return self.resources if self.fleet is None else {"CPU": float(self.fleet.num_slots)}

    def remote(self, **options: Any) -> Any:
        made = SimpleNamespace(remote=lambda *arguments: self._start())
        return lambda kind: SimpleNamespace(options=lambda **options: made)

    def _start(self) -> Actor:
        actor = Actor(self)
        if self.fleet is None:
            actor.settle(None)
        else:
            self.fleet.place(actor)
        return actor

    # -- what the actors tell

    def call(self, actor: Actor, name: str, arguments: tuple[Any, ...], refs: list[Any]) -> None:
        """Hand a call of the driver's on."""
        actor.call(name, arguments, refs)

    def asked(self, actor: Actor, asked: Asked) -> None:
        """Hear of work that a worker got."""

    def ended(self, actor: Actor, linger_s: float) -> None:
        """Hear of an actor's death; its room is free when its process has ended."""
        if self.fleet is not None:
            fleet = self.fleet
            self.after(linger_s, lambda: fleet.leave(actor))

    def compute(self, asked: Asked) -> Any:
        """Return what comes of work that was done, and keep it if so asked."""
        value = self._value(asked)
        if asked.keep is not None:
            self.storage[asked.keep] = value
        return value

    def _value(self, asked: Asked) -> Any:
        if asked.name == "run":
            return str(asked.rows)
        if asked.name == "restore":
            if asked.keep not in self.storage:
                raise StoreError("it is not there")
            return self.storage[asked.keep]
        if any(ref.lost for ref in asked.inputs):
            raise ray.exceptions.ObjectLostError("0", None, "")
        return f"({'+'.join(str(ref.value) for ref in asked.inputs)})"
