"""A stand-in for Ray with simulated workers and a clock of its own: hours pass at once.

Crew, drive, schedule and pool are the driver's own; each worker does what a test says. A unit's sum is the list of its
rows, as text, and a merge's the expression that made it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ray.exceptions

from fisher_ray.config import Config
from fisher_ray.errors import StoreError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime import crew, drive, member, passing, pool, resources, starts, watch
from fisher_ray.runtime.tree import Node
from fisher_ray.runtime.worker import Place
from tests.integration.runs import digits

HANG = None
"""Instead of seconds: the work never ends, but the worker answers."""
STOP, DIE = "stop", "die"
"""What comes of work, or of a start: its whole process hangs, or ends."""

READ_S = 0.001
"""How long after it was asked a worker begins."""

Outcome = tuple[float | None, str | Exception]
"""After how many seconds, and what: ``"ok"``, :data:`STOP`, :data:`DIE` or an error."""


class HangError(Exception):
    """The simulated time is up."""


@dataclass
class Asked:
    """What a worker is asked to do.

    Attributes:
        worker: its number, from 1.
        name: ``run``, ``merge``, ``restore`` or ``solo``.
        task: what is run.
        unit: its rows.
        inputs: of a merge or a solo step.
        keep: where the result is to be kept, or is.
    """

    worker: int
    name: str
    task: Any = None
    unit: Unit = field(default=Unit(-1, 0, 0))
    inputs: list[Ref] = field(default_factory=list)
    keep: Any = None

    @property
    def rows(self) -> list[int]:
        return [row for row in range(self.unit.start, self.unit.stop) if row not in dict(self.unit.excluded)]


Behave = Callable[[Asked], Outcome]


class Ref:
    """A result that comes, or has come; ``lost`` with its machine."""

    def __init__(self) -> None:
        self.done, self.lost, self.value, self.error = False, False, None, None

    def set(self, value: Any = None, error: BaseException | None = None) -> None:
        if not self.done:
            self.done, self.value, self.error = True, value, error


class Stream:
    """The results of a step that is done once."""

    def __init__(self) -> None:
        self.items: list[Ref] = []
        self.ended = False

    @property
    def done(self) -> bool:
        return self.ended or bool(self.items)

    def set(self, value: Any = None, error: BaseException | None = None) -> None:
        if not self.ended:
            self.items.append(Ref())
            self.items[-1].set(value, error)
            self.ended = True

    def __next__(self) -> Ref:
        if not self.items:
            raise StopIteration
        return self.items.pop(0)


class World:
    """The clock, the workers and the storage.

    Args:
        seed: of ``chance``.
        limit_s: when the test is given up.
        linger_s: how long the process of a worker that was killed goes on with its work.
        overtakes: whether a worker with two units may begin with the second.
    """

    exceptions = ray.exceptions

    def __init__(self, seed: int = 0, limit_s: float = 1e6, linger_s: float = 0.0, overtakes: bool = False) -> None:
        self.now, self.limit_s, self.linger_s, self.overtakes = 0.0, limit_s, linger_s, overtakes
        self.chance, self._events, self._order = random.Random(seed), list[Any](), itertools.count()
        self.actors: list[Actor] = []
        self.storage: dict[Node, str] = {}
        self.resources = {"CPU": 64.0}
        self.behave: Behave = lambda asked: (1.0, "ok")
        self.start: Callable[[int], Outcome] = lambda number: (1.0, "ok")

    def monotonic(self) -> float:
        return self.now

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def pass_until(self, end: float) -> None:
        """Let the next thing happen, or the time pass."""
        if self._events and self._events[0][0] <= end:
            self.now, _, act = heapq.heappop(self._events)
            act()
        else:
            self.now = end

    # -- as Ray's module

    def wait(self, refs: list[Any], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Any], list[Any]]:
        end = self.now + timeout
        while True:
            came = [ref for ref in refs if ref.done][:num_returns]
            due = bool(self._events) and self._events[0][0] <= end
            if len(came) == num_returns or (self.now >= end and not due):
                return came, [ref for ref in refs if ref not in came]
            self.pass_until(end)
            if self.now > self.limit_s:
                raise HangError(f"still at it after {self.now:.0f} s")

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
        return self.resources

    def remote(self, **options: Any) -> Any:
        made = SimpleNamespace(remote=lambda *arguments: Actor(self))
        return lambda kind: SimpleNamespace(options=lambda **options: made)


class Method:
    """A method of an actor."""

    def __init__(self, actor: Actor, name: str, num_returns: Any = 1) -> None:
        self._actor, self._name, self._num_returns = actor, name, num_returns

    def options(self, num_returns: Any = 1, concurrency_group: str | None = None) -> Method:
        return Method(self._actor, self._name, num_returns)

    def remote(self, *arguments: Any) -> Any:
        if self._num_returns == "streaming":
            stream = Stream()
            self._actor.call(self._name, arguments, [stream])
            return stream
        refs = [Ref() for _ in range(self._num_returns)]
        self._actor.call(self._name, arguments, refs)
        return refs if len(refs) > 1 else refs[0]


class Actor:
    """One worker, which computes one piece of work at a time."""

    def __init__(self, world: World) -> None:
        self._world, self._up, self._busy, self._stopped = world, False, False, False
        self._dead_s, self._linger_s = float("inf"), 0.0
        self._pending: list[Any] = []
        self._asking: list[Ref] = []
        self._queue: list[tuple[Asked, list[Any]]] = []
        self._made: list[Any] = []
        self._refusal: BaseException | None = None
        world.actors.append(self)
        self.number = len(world.actors)
        seconds, how = world.start(self.number)
        if seconds is not None:
            world.after(seconds, lambda: self.come_up(how))

    ready, live = property(lambda self: Method(self, "ready")), property(lambda self: Method(self, "live"))
    run, merge = property(lambda self: Method(self, "run")), property(lambda self: Method(self, "merge"))
    restore, solo = property(lambda self: Method(self, "restore")), property(lambda self: Method(self, "solo"))

    @property
    def dead(self) -> bool:
        return self._world.now >= self._dead_s

    def die(self, linger_s: float = 0.0) -> None:
        if not self.dead:
            self._dead_s, self._linger_s = self._world.now, linger_s
            for ref in self._pending:
                ref.set(error=ray.exceptions.ActorDiedError())

    def stop(self) -> None:
        """Hang, with all that the process does."""
        self._stopped = True

    def lose(self) -> None:
        """Lose the results that lie on the worker's machine."""
        for ref in self._made:
            ref.lost = True

    def call(self, name: str, arguments: tuple[Any, ...], refs: list[Any]) -> None:
        self._pending += refs
        if self.dead:
            for ref in refs:
                ref.set(error=ray.exceptions.ActorDiedError())
        elif name == "ready":
            self._asking += refs
            self._answer()
        elif name != "live":
            self._queue.append((self._asked(name, arguments), refs))
            self._world.after(READ_S, self._next)

    def come_up(self, how: str | Exception) -> None:
        if self.dead:
            return
        if how == DIE:
            return self.die()
        self._up, self._refusal = True, task_error(how) if isinstance(how, Exception) else None
        self._answer()
        self._next()

    def _answer(self) -> None:
        if self._up and not self._stopped:
            for ref in self._asking:
                ref.set(Place("host", self.number, "cpu", 1), self._refusal)
            self._asking = []

    def _asked(self, name: str, arguments: tuple[Any, ...]) -> Asked:
        if name == "run":
            _, task, unit, _, _, keep, _ = arguments
            return Asked(self.number, name, task, unit, keep=keep)
        if name == "merge":
            task, left, right, keep = arguments
            return Asked(self.number, name, task, inputs=[*left, *right], keep=keep)
        if name == "restore":
            return Asked(self.number, name, keep=arguments[0])
        task, _, inputs, _ = arguments
        return Asked(self.number, name, task, inputs=[ref for refs in inputs for ref in refs])

    def _next(self) -> None:
        if self._busy or not self._queue or self.dead or not self._up:
            return
        second = self._world.overtakes and len(self._queue) > 1 and self._world.chance.random() < 0.5
        asked, refs = self._queue.pop(1 if second else 0)
        self._busy = True
        seconds, how = self._world.behave(asked)
        if how == STOP:
            self.stop()
        elif seconds is not None:
            self._world.after(seconds, lambda: self._end(asked, refs, how))

    def _end(self, asked: Asked, refs: list[Any], how: str | Exception) -> None:
        if self._stopped or self._world.now > self._dead_s + self._linger_s:
            return
        if how == DIE:
            return self.die()
        self._busy = False
        try:
            if isinstance(how, Exception):
                raise how
            value = self._compute(asked)
        except Exception as error:  # noqa: BLE001 - as Ray does
            for ref in refs:
                ref.set(error=task_error(error))
        else:
            if asked.keep is not None:
                self._world.storage[asked.keep] = value
            refs[0].set(value)
            refs[-1].set(Receipt(asked.unit, 1, worker=str(self.number)) if asked.name == "run" else None)
            self._made.append(refs[0])
        self._pending = [ref for ref in self._pending if ref not in refs]
        self._next()

    def _compute(self, asked: Asked) -> str:
        if asked.name == "run":
            return str(asked.rows)
        if asked.name == "restore":
            if asked.keep not in self._world.storage:
                raise StoreError("it is not there")
            return self._world.storage[asked.keep]
        if any(ref.lost for ref in asked.inputs):
            raise ray.exceptions.ObjectLostError("0", None, "")
        return f"({'+'.join(str(ref.value) for ref in asked.inputs)})"


class Checkpoints:
    """Sums that are kept on the world's storage, by their nodes."""

    def __init__(self, world: World, level: int) -> None:
        self._world, self._level = world, level

    def found(self) -> list[Node]:
        nodes = [*self._world.storage]
        return [node for node in nodes if not any(other.covers(node) for other in nodes)]

    def place(self, node: Node) -> Node | None:
        return node if node.level >= self._level else None

    def url(self, node: Node) -> Node:
        return node

    def remove(self, nodes: list[Node]) -> None:
        for node in nodes:
            self._world.storage.pop(node, None)


def task_error(cause: Exception) -> BaseException:
    return ray.exceptions.RayTaskError("task", "", cause).as_instanceof_cause()


def merged(sums: list[str]) -> str:
    """The expression of the fixed tree over some sums."""
    while len(sums) > 1:
        pairs = [sums[i : i + 2] for i in range(0, len(sums), 2)]
        sums = [f"({'+'.join(pair)})" if len(pair) == 2 else pair[0] for pair in pairs]
    return sums[0]


def let_pass(world: World, given: crew.Crew, seconds: float) -> None:
    """Let the leftovers of a pass end."""
    end = world.now + seconds
    while world.now < end:
        given.wait(1.0)
        for late in given.expired():
            given.bury(late, TimeoutError("gone"))


@cache
def _config(*overrides: str) -> Config:
    return digits(Path("nowhere"), *overrides)


@contextmanager
def simulated(
    world: World,
    behave: Behave | None = None,
    start: Callable[[int], Outcome] | None = None,
    *overrides: str,
    notes: list[str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Any, crew.Crew]]:
    """A pool and its crew, by default of two workers that start within a second and take one for everything."""
    world.behave, world.start = behave or world.behave, start or world.start
    config = _config("runtime.num_workers=2", "runtime.gpus_per_worker=0", "data.on_error=skip", *overrides)
    note = ([] if notes is None else notes).append
    session: Any = SimpleNamespace(embedded=True, connect=lambda: None, worker_environment=dict)
    metrics = SimpleNamespace(show=lambda *values: None, retry=lambda *values: None)
    modules = (crew, drive, member, passing, pool, resources, starts, watch)
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(pool, "DriverMetrics", return_value=metrics))
        for module, name in itertools.product(modules, ("ray", "time")):
            if hasattr(module, name):
                patched.enter_context(mock.patch.object(module, name, world))
        made = crew.Crew(session, config, None, note, lambda name, value: value)
        yield pool.Pool(made, config, note, check), made
