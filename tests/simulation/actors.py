"""Simulated workers: each does what its world says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import ray.exceptions

from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime.worker import Place
from tests.simulation.results import Ref, Stream

if TYPE_CHECKING:
    from tests.simulation.machines import Machine
    from tests.simulation.world import World

HANG = None
"""Instead of seconds: the work never ends, but the worker answers."""
STOP, DIE = "stop", "die"
"""What comes of work, or of a start: its whole process hangs, or ends."""
READ_S = 0.001
"""How long after it was asked a worker begins."""

How = str | Exception
"""What comes of work: ``"ok"``, :data:`STOP`, :data:`DIE` or an error."""
Outcome = tuple[float | None, How]
"""After how many seconds, and what."""


@dataclass
class Asked:
    """What a worker is asked to do.

    Attributes:
        worker: its number, from 1.
        name: ``run``, ``merge``, ``restore`` or ``solo``.
        task: what is run.
        stage: of a run.
        unit: its rows.
        inputs: of a merge or a solo step.
        keep: where the result is to be kept, or is.
        actor: the worker.
    """

    worker: int
    name: str
    task: Any = None
    unit: Unit = field(default=Unit(-1, 0, 0))
    inputs: list[Ref] = field(default_factory=list)
    keep: Any = None
    stage: str = ""
    actor: Any = None

    @property
    def rows(self) -> list[int]:
        excluded = dict(self.unit.excluded)
        return [row for row in range(self.unit.start, self.unit.stop) if row not in excluded]


class Turn:
    """What one piece of work of a worker has at a time; the others wait in order."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: list[Callable[[], None]] = []

    def take(self, then: Callable[[], None]) -> None:
        if self._taken:
            self._waiting.append(then)
        else:
            self._taken = True
            then()

    def release(self) -> None:
        self._taken = bool(self._waiting)
        if self._waiting:
            self._waiting.pop(0)()


Steps = Iterator[float | Turn]
"""A piece of work that yields how long it takes to go on, or a turn that it waits for, and returns what came of it."""
Behave = Callable[[Asked], "Outcome | Steps"]


class Method:
    """A method of an actor."""

    def __init__(self, actor: Actor, name: str, num_returns: Any = 1) -> None:
        self._actor, self._name, self._num_returns = actor, name, num_returns

    def options(self, num_returns: Any = 1, concurrency_group: str | None = None) -> Method:
        return Method(self._actor, self._name, num_returns)

    def remote(self, *arguments: Any) -> Any:
        if self._num_returns == "streaming":
            stream = Stream()
            self._actor.world.call(self._actor, self._name, arguments, [stream])
            return stream
        sums = self._num_returns - 1
        refs = [Ref(is_sum=number < sums) for number in range(self._num_returns)]
        self._actor.world.call(self._actor, self._name, arguments, refs)
        return refs if len(refs) > 1 else refs[0]


class Actor:
    """One worker, which does ``world.at_once`` pieces of work at a time."""

    def __init__(self, world: World) -> None:
        self.world, self._up, self._stopped = world, False, False
        self._dead_s, self._linger_s = float("inf"), 0.0
        self._pending: dict[Any, None] = {}
        self._asking: list[Ref] = []
        self._queue: list[tuple[Asked, list[Any]]] = []
        self._made: list[Any] = []
        self._refusal: BaseException | None = None
        self.machine: Machine | None = None
        self.num_busy, self.num_asked, self.turn = 0, 0, Turn()
        world.actors.append(self)
        self.number = len(world.actors)

    ready, live = property(lambda self: Method(self, "ready")), property(lambda self: Method(self, "live"))
    run, merge = property(lambda self: Method(self, "run")), property(lambda self: Method(self, "merge"))
    restore, solo = property(lambda self: Method(self, "restore")), property(lambda self: Method(self, "solo"))

    @property
    def dead(self) -> bool:
        return self.world.now >= self._dead_s

    @property
    def ended(self) -> bool:
        """Whether its process has gone, or does nothing any more."""
        return self._stopped or self.world.now > self._dead_s + self._linger_s

    def settle(self, machine: Machine | None) -> None:
        """Start, on a machine that has room."""
        self.machine = machine
        seconds, how = self.world.start(self.number)
        if seconds is not None:
            self.world.after(seconds, lambda: self.come_up(how))

    def die(self, linger_s: float = 0.0) -> None:
        if not self.dead:
            self._dead_s, self._linger_s = self.world.now, linger_s
            for ref in self._pending:
                ref.set(error=ray.exceptions.ActorDiedError())
            self._pending = {}
            self.world.ended(self, linger_s)

    def stop(self) -> None:
        """Hang, with all that the process does."""
        self._stopped = True

    def lose(self) -> None:
        """Lose the results that lie on the worker's machine."""
        for ref in self._made:
            ref.lost = True

    def call(self, name: str, arguments: tuple[Any, ...], refs: list[Any]) -> None:
        self._pending |= dict.fromkeys(refs)
        if self.dead:
            for ref in refs:
                ref.set(error=ray.exceptions.ActorDiedError())
        elif name == "ready":
            self._asking += refs
            self._answer()
        elif name != "live":
            asked = self._asked(name, arguments)
            self.num_asked += 1
            self.world.asked(self, asked)
            self._queue.append((asked, refs))
            self.world.after(READ_S, self._next)

    def come_up(self, how: How) -> None:
        if self.dead:
            return
        if how == DIE:
            return self.die()
        self._up, self._refusal = True, task_error(how) if isinstance(how, Exception) else None
        self._answer()
        for _ in self._queue[:]:
            self._next()

    def _answer(self) -> None:
        if self._up and not self._stopped:
            for ref in self._asking:
                self._pending.pop(ref, None)
                ref.set(Place("host", self.number, "cpu", 1), self._refusal)
            self._asking = []

    def _asked(self, name: str, arguments: tuple[Any, ...]) -> Asked:
        if name == "run":
            stage, task, unit, _, _, keep, _ = arguments
            return Asked(self.number, name, task, unit, keep=keep, stage=stage, actor=self)
        if name == "merge":
            task, left, right, keep = arguments
            return Asked(self.number, name, task, inputs=[*left, *right], keep=keep, actor=self)
        if name == "restore":
            return Asked(self.number, name, keep=arguments[0], actor=self)
        task, _, inputs, _ = arguments
        return Asked(self.number, name, task, inputs=[ref for refs in inputs for ref in refs], actor=self)

    def _next(self) -> None:
        if self.num_busy >= self.world.at_once or not self._queue or self.dead or not self._up:
            return
        second = self.world.overtakes and len(self._queue) > 1 and self.world.chance.random() < 0.5
        asked, refs = self._queue.pop(1 if second else 0)
        self.num_busy += 1
        found = self.world.behave(asked)
        if isinstance(found, tuple):
            found = _steps(*found)
        self._go_on(asked, refs, found)

    def _go_on(self, asked: Asked, refs: list[Any], steps: Any) -> None:
        """Do the next step of a piece of work."""
        if self.ended:
            return
        try:
            step = next(steps)
        except StopIteration as end:
            return self._end(asked, refs, end.value)
        if step == STOP:
            return self.stop()
        if isinstance(step, Turn):
            step.take(lambda: self._go_on(asked, refs, steps))
        elif step is not None:
            self.world.after(step, lambda: self._go_on(asked, refs, steps))

    def _end(self, asked: Asked, refs: list[Any], how: How) -> None:
        if how == DIE:
            return self.die()
        self.num_busy -= 1
        self.num_asked -= 1
        for ref in refs:
            self._pending.pop(ref, None)
        try:
            if isinstance(how, Exception):
                raise how
            value = self.world.compute(asked)
        except Exception as error:  # noqa: BLE001 - as Ray does
            for ref in refs:
                ref.set(error=task_error(error))
        else:
            for ref in refs[:-1]:
                ref.set(value, home=self)
            receipt = Receipt(asked.unit, 1, worker=str(self.number)) if asked.name == "run" else None
            refs[-1].set(value if asked.name == "solo" else receipt, home=self)
            self._made += refs[:-1]
        self._next()


def _steps(seconds: float | None, how: How) -> Any:
    yield STOP if how == STOP else seconds
    return how


@lru_cache(64)
def task_error(cause: Exception) -> BaseException:
    """Return what Ray makes of a task's error, which takes it long: the same for the same."""
    error = ray.exceptions.RayTaskError("task", "", cause, proctitle="worker", pid=1, ip="0.0.0.0")
    return error.as_instanceof_cause()
