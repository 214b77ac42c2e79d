"""Machines in zones, which come and go with all that lies on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Machine:
    """Holds some actors, and what they made.

    Attributes:
        number: from 1.
        zone: machines of one zone may go together.
        slots: how many actors it has room for.
        actors: that are there, or whose processes are.
        past: all that have been there: what they made stays when they end.
        gone: whether it is.
    """

    number: int
    zone: int
    slots: int
    actors: list[Any] = field(default_factory=list)
    past: list[Any] = field(default_factory=list)
    gone: bool = False

    @property
    def has_room(self) -> bool:
        return not self.gone and len(self.actors) < self.slots

    def take(self, actor: Any) -> None:
        self.actors.append(actor)
        self.past.append(actor)
        actor.settle(self)


class Fleet:
    """All machines; an actor that finds no room waits for it, as in Ray."""

    def __init__(self) -> None:
        self.machines: list[Machine] = []
        self._homeless: list[Any] = []

    @property
    def living(self) -> list[Machine]:
        return [machine for machine in self.machines if not machine.gone]

    @property
    def num_slots(self) -> int:
        return sum(machine.slots for machine in self.living)

    def add(self, zone: int, slots: int = 1) -> Machine:
        machine = Machine(len(self.machines) + 1, zone, slots)
        self.machines.append(machine)
        self._settle(machine)
        return machine

    def place(self, actor: Any) -> None:
        for machine in self.machines:
            if machine.has_room:
                machine.take(actor)
                return
        self._homeless.append(actor)

    def leave(self, actor: Any) -> None:
        """Give an actor's room to another: its process has ended."""
        if actor in self._homeless:
            self._homeless.remove(actor)
        if actor.machine is not None and actor in actor.machine.actors:
            actor.machine.actors.remove(actor)
            self._settle(actor.machine)

    def lose(self, machine: Machine) -> None:
        """End a machine, its actors, and the results that lie there."""
        machine.gone = True
        for actor in list(machine.actors):
            actor.die()
        for actor in machine.past:
            actor.lose()

    def _settle(self, machine: Machine) -> None:
        while self._homeless and machine.has_room:
            machine.take(self._homeless.pop(0))
