"""Which piece of work comes next: units in order, a fixed merge tree over their results, attempts counted.

No Ray here: results are opaque values, so every decision can be tested by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fisher_ray.errors import DataError, WorkersLostError
from fisher_ray.records import Unit
from fisher_ray.runtime.isolation import Isolation
from fisher_ray.runtime.tree import Node, Tree
from fisher_ray.runtime.waiting import Waiting


@dataclass(frozen=True)
class Part:
    """Some rows of a unit that is under suspicion, which are tried by themselves.

    Attributes:
        node: the unit's.
        unit: the rows.
    """

    node: Node
    unit: Unit


Work = Node | Part


class Schedule:
    """What is to be done, is being done and is finished, for some units and, if wanted, the merges of their results.

    The order of every sum is given by the units alone, which make the tree. Merges come before further units, which
    keeps few results in memory; parts of units under suspicion come last. The same work may be handed out twice
    (:meth:`copy`): the first result counts.

    Args:
        units: in order.
        max_attempts: how often one piece of work may fail, or its worker die, or its inputs be lost.
        merge: whether results are merged; otherwise they are not kept.
        kept: nodes whose results are on storage already: to be had without their units.
        isolate: whether a unit that fails, or kills its workers, too often is looked at row by row.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        max_attempts: int,
        *,
        merge: bool,
        kept: Iterable[Node] = (),
        isolate: bool = False,
    ) -> None:
        """See the class."""
        self._units, self._max_attempts, self._merge, self._isolate = list(units), max_attempts, merge, isolate
        self._tree = Tree(len(self._units))
        self._kept = set(kept)
        self._open = set(self._leaves(self.root)) if self._units else set()
        self._queue = Waiting(sorted(self._open, key=lambda node: node.first_unit))
        self._running: Counter[Work] = Counter()
        self._attempts: Counter[Node] = Counter()
        self._failures: Counter[Node] = Counter()
        self._deaths: Counter[Node] = Counter()
        self._losses: Counter[Node] = Counter()
        self._results: dict[Node, Any] = {}
        self._ready = Waiting()  # merges whose inputs are there
        self._isolations: dict[Node, Isolation] = {}  # units under suspicion
        self._isolated: set[Node] = set()
        self._alone: set[Node] = set()

    @property
    def root(self) -> Node:
        """The node of the whole sum."""
        return self._tree.root

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self._open and (not self._merge or not self._units or self.root in self._results)

    @property
    def result(self) -> Any:
        """The root of the merge tree."""
        return self._results[self.root]

    @property
    def num_units(self) -> int:
        """How many units are still to be computed."""
        return sum(1 for node in self._open if node not in self._kept)

    @property
    def num_waiting(self) -> int:
        """How many pieces of work may start just now."""
        return len(self._queue) + len(self._ready)

    def unit(self, node: Node) -> Unit:
        """Return the unit of a node at level 0."""
        return self._units[node.position]

    def is_kept(self, node: Node) -> bool:
        """Whether a node's result is to be had from storage."""
        return node in self._kept

    def inputs(self, node: Node) -> tuple[Any, Any]:
        """Return the two results that a merge adds, left first."""
        left, right = self._tree.children(node)
        return self._results[left], self._results[right]

    def take(self, *, beside: bool = False) -> tuple[Work, int] | None:
        """Hand out the next piece of work with the number of its attempt, from 1; None if there is none just now.

        With ``beside`` it is for somebody who has another piece of work.
        """
        waiting = self._ready or self._queue
        if waiting and not (beside and self.is_alone(waiting.first)):
            return self.copy(waiting.take())
        if beside:
            return None
        for node, isolation in self._isolations.items():
            if (unit := isolation.take()) is not None:
                return self.copy(Part(node, unit))
        return None

    def copy(self, work: Work) -> tuple[Work, int]:
        """Hand a piece of work out again that somebody is slow at."""
        self._running[work] += 1
        if isinstance(work, Part):
            return work, self._attempts[work.node]
        self._attempts[work] += 1
        return work, self._attempts[work]

    def may_copy(self, work: Work) -> bool:
        """Whether a piece of work may be handed out again: only one has it, and it is not looked at row by row."""
        return self._running[work] == 1 and work not in self._isolations and self.wants(work)

    def is_alone(self, work: Work) -> bool:
        """Whether whoever has this piece of work is to have no other, so that it is known by what a worker dies."""
        return isinstance(work, Part) or work in self._alone

    def num_running(self, work: Work) -> int:
        """Return how many have a piece of work."""
        return self._running[work]

    def wants(self, work: Work) -> bool:
        """Whether a piece of work is still to be done, of which nobody has brought the result."""
        if work in self._open:
            return True
        if isinstance(work, Part):
            return work.node in self._isolations and self._isolations[work.node].tries(work.unit)
        return not self._is_leaf(work) and all(child in self._results for child in self._tree.children(work))

    def release(self, work: Work) -> None:
        """Take note that somebody does not have a piece of work any more, or that nobody waits for it from them."""
        self._running[work] -= 1
        if self._running[work] <= 0:
            del self._running[work]

    def give_back(self, node: Node) -> None:
        """Take note that somebody could not do what was to be done in another way by then: it is handed out anew."""
        self.release(node)
        if self.wants(node):
            self._put_back(node)

    def done(self, work: Work, result: Any, *, kept: bool = False) -> bool:
        """Keep a result; what it was merged from is let go.

        Args:
            work: what is done.
            result: any value; parts have none.
            kept: whether it is on storage too.

        Returns:
            Whether it is the first of this piece of work.
        """
        self.release(work)
        if not self.wants(work):
            return False
        if isinstance(work, Part):
            self._isolations[work.node].passed(work.unit)
            return False
        self._open.discard(work)
        self._isolations.pop(work, None)
        self._queue.discard(work)
        for child in self._tree.children(work):
            self._results.pop(child, None)
        if kept:
            self._kept.add(work)
        if self._merge:
            self._results[work] = result
            self._lift(work)
        return True

    def superseded(self, node: Node) -> list[Node]:
        """Return the nodes below one that were kept on storage, which need not be kept any more."""
        below = [other for child in self._tree.children(node) for other in self._kept_below(child)]
        self._kept.difference_update(below)
        return below

    def failed(self, work: Work, reason: str) -> None:
        """Put a piece of work back, or look at its rows if it has failed too often.

        Raises:
            DataError: if that cannot help.
        """
        self.release(work)
        if not self.wants(work) or work in self._isolations:
            return
        if isinstance(work, Part):
            self._isolations[work.node].failed(work.unit, reason)
        else:
            self._failures[work] += 1
            if self._failures[work] < self._max_attempts:
                self._put_back(work)
            elif not self._suspect(work, reason):
                raise DataError(f"{self.name(work)} failed {self._failures[work]} times; the last time: {reason}")

    def died(self, work: Work, reason: str) -> None:
        """Put a piece of work back whose worker died, or look at its rows if that has happened too often.

        Raises:
            WorkersLostError: if that cannot help.
        """
        if isinstance(work, Part):
            self.failed(work, f"its worker died: {reason}")
            return
        self.release(work)
        if self.wants(work) and work not in self._isolations:
            self._deaths[work] += 1
            if self._deaths[work] < self._max_attempts:
                self._put_back(work)
            elif not self._suspect(work, f"its worker died: {reason}"):
                raise self._given_up(work, self._deaths[work], f"its worker died; the last time: {reason}")

    def died_beside(self, work: Work) -> None:
        """Put a piece of work back whose worker died while it had another too: from now on it is done alone."""
        if isinstance(work, Node):
            self._alone.add(work)
        self.returned(work)

    def returned(self, work: Work) -> None:
        """Put a piece of work back that its worker had not come to."""
        self.release(work)
        if not self.wants(work):
            return
        if isinstance(work, Node):
            self._attempts[work] -= 1
            self._put_back(work)
        elif not self._running[work]:
            self._isolations[work.node].returned(work.unit)

    def lost(self, node: Node) -> list[Unit]:
        """Take note that a merge's inputs are gone: their units are computed again, which is no failure of theirs.

        Raises:
            WorkersLostError: if it lost them ``max_attempts`` times.
        """
        self.release(node)
        if not self.wants(node):
            return []
        self._losses[node] += 1
        if self._losses[node] >= self._max_attempts:
            what = "its inputs were lost with the machines that held them"
            raise self._given_up(node, self._losses[node], what)
        return [unit for child in self._tree.children(node) for unit in self._forget(child)]

    def lost_result(self) -> list[Unit]:
        """Take note that the whole sum is gone: as :meth:`lost`."""
        self._losses[self.root] += 1
        if self._losses[self.root] >= self._max_attempts:
            raise self._given_up(self.root, self._losses[self.root], "it was lost with the machine that held it")
        return self._forget(self.root)

    def unkept(self, node: Node) -> list[Unit]:
        """Take note that a result cannot be had from storage after all; its units are computed again."""
        self.release(node)
        self._kept.discard(node)
        self._open.discard(node)
        return self._forget(node)

    def concluded(self) -> list[tuple[Node, Isolation]]:
        """Return, once each, the units under suspicion whose rows have been looked at."""
        ended = [(node, isolation) for node, isolation in self._isolations.items() if isolation.finished]
        for node, _ in ended:
            del self._isolations[node]
        return ended

    def resume(self, node: Node, unit: Unit) -> None:
        """Take a unit up again that was under suspicion, without the rows that it now excludes."""
        self._units[node.position] = unit
        self._failures[node] = self._deaths[node] = 0
        self._put_back(node)

    def name(self, work: Work) -> str:
        """Say which piece of work it is."""
        if isinstance(work, Part):
            return f"rows [{work.unit.start}, {work.unit.stop}) of unit {work.unit.index}"
        if work.level:
            return f"merging sums (level {work.level}, position {work.position})"
        unit = self.unit(work)
        return f"unit {unit.index} with rows [{unit.start}, {unit.stop})"

    def _is_leaf(self, node: Node) -> bool:
        return node.level == 0 or node in self._kept

    def _put_back(self, node: Node) -> None:
        if self._running[node]:
            return  # somebody else has it too
        if not self._is_leaf(node):
            self._ready.put_first(node)
        elif node not in self._isolations:
            self._queue.put_first(node)

    def _suspect(self, node: Node, reason: str) -> bool:
        """Look at a unit's rows, if that has not been done, and can be."""
        if not self._isolate or node.level or node in self._kept or node in self._isolated:
            return False
        self._isolated.add(node)
        self._isolations[node] = Isolation(self.unit(node), reason, self._max_attempts)
        return True

    def _given_up(self, node: Node, times: int, what: str) -> WorkersLostError:
        return WorkersLostError(
            f"{self.name(node)} was tried {times} times: {what}. If machines come and go, run again "
            "to resume; if not, look at the workers' memory."
        )

    def _forget(self, node: Node) -> list[Unit]:
        self._results.pop(node, None)
        if not self._is_leaf(node):
            return [unit for child in self._tree.children(node) for unit in self._forget(child)]
        self._open.add(node)
        self._queue.put_first(node)
        return [] if node in self._kept else [self.unit(node)]

    def _kept_below(self, node: Node) -> list[Node]:
        """Return the nodes of a subtree that are kept: none has another one below."""
        if node in self._kept:
            return [node]
        return [other for child in self._tree.children(node) for other in self._kept_below(child)]

    def _leaves(self, node: Node) -> list[Node]:
        """Return the nodes below one whose results are had without merging."""
        if self._is_leaf(node):
            return [node]
        return [leaf for child in self._tree.children(node) for leaf in self._leaves(child)]

    def _lift(self, node: Node) -> None:
        """Move a result without a neighbour up until it has one, and see whether they can be merged."""
        while self._tree.moves_up(node) and (above := self._tree.above(node)) is not None:
            self._results[above] = self._results.pop(node)
            node = above
        above = self._tree.above(node)
        if above is None or self._running[above]:
            return
        if all(child in self._results for child in self._tree.children(above)):
            self._ready.append(above)
