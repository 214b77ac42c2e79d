"""Which piece of work comes next: units in order, a fixed merge tree over their results, attempts counted.

No Ray here: results are opaque values, so every decision can be tested by itself.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fisher_ray.errors import DataError, WorkersLostError
from fisher_ray.records import Unit


@dataclass(frozen=True)
class Node:
    """One node of the merge tree: a unit's own result at level 0, a merge of two neighbours above.

    Attributes:
        level: 0 for units.
        position: from the left.
    """

    level: int
    position: int


class Schedule:
    """What is to be done, is being done and is finished, for some units and, if wanted, the merges of their results.

    The tree joins neighbours level by level; a last one without a neighbour moves up as it is. So the order of every
    sum is given by the units alone. Merges come before further units, which keeps few results in memory.

    Args:
        units: in order.
        max_attempts: how often one piece of work may fail, or its inputs be lost.
        merge: whether results are merged; otherwise they are not kept.
    """

    def __init__(self, units: Sequence[Unit], max_attempts: int, *, merge: bool) -> None:
        """See the class."""
        self._units, self._max_attempts, self._merge = list(units), max_attempts, merge
        self._queue = deque(Node(0, position) for position in range(len(self._units)))
        self._attempts: Counter[Node] = Counter()
        self._failures: Counter[Node] = Counter()
        self._losses: Counter[Node] = Counter()
        self._results: dict[Node, Any] = {}
        self._running: set[Node] = set()
        self._left = len(self._units)  # units whose result has not come
        self._widths = [len(self._units)]
        while self._widths[-1] > 1:
            self._widths.append(-(-self._widths[-1] // 2))

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        if self._left:
            return False
        return not self._merge or not self._units or Node(len(self._widths) - 1, 0) in self._results

    @property
    def result(self) -> Any:
        """The root of the merge tree."""
        return self._results[Node(len(self._widths) - 1, 0)]

    def unit(self, node: Node) -> Unit:
        """Return the unit of a node at level 0."""
        return self._units[node.position]

    def inputs(self, node: Node) -> tuple[Any, Any]:
        """Return the two results that a merge adds, left first."""
        left, right = self._children(node)
        return self._results[left], self._results[right]

    def take(self) -> tuple[Node, int] | None:
        """Hand out the next piece of work with the number of its attempt, from 1; None if there is none just now."""
        node = self._ready_merge()
        if node is None and self._queue:
            node = self._queue.popleft()
        if node is None:
            return None
        self._running.add(node)
        self._attempts[node] += 1
        return node, self._attempts[node]

    def done(self, node: Node, result: Any) -> None:
        """Keep a result; what it was merged from is let go."""
        self._running.discard(node)
        if node.level == 0:
            self._left -= 1
        else:
            for child in self._children(node):
                del self._results[child]
        if self._merge:
            self._results[node] = result
            self._lift(node)

    def failed(self, node: Node, reason: str) -> None:
        """Put a piece of work back.

        Raises:
            DataError: if it has failed ``max_attempts`` times.
        """
        self._running.discard(node)
        self._failures[node] += 1
        if self._failures[node] >= self._max_attempts:
            raise DataError(f"{self._name(node)} failed {self._failures[node]} times; the last time: {reason}")
        if node.level == 0:
            self._queue.appendleft(node)

    def died(self, node: Node, reason: str) -> None:
        """Put a piece of work back whose worker died, which is no failure of its own as far as one can tell.

        Raises:
            WorkersLostError: if that happened ``max_attempts`` times.
        """
        self._count_loss(node, f"its worker died; the last time: {reason}")
        if node.level == 0:
            self._queue.appendleft(node)

    def lost(self, node: Node) -> list[Unit]:
        """Take note that a merge's inputs are gone: their units are computed again, which is no failure of theirs.

        Raises:
            WorkersLostError: if it lost them ``max_attempts`` times.
        """
        self._count_loss(node, "its inputs were lost with the machines that held them")
        again: list[Unit] = []
        for child in self._children(node):
            again += self._forget(child)
        return again

    def _count_loss(self, node: Node, what: str) -> None:
        self._running.discard(node)
        self._losses[node] += 1
        if self._losses[node] >= self._max_attempts:
            raise WorkersLostError(
                f"{self._name(node)} was tried {self._losses[node]} times: {what}. If machines come and go, run again "
                "to resume; if not, look at the workers' memory."
            )

    def _forget(self, node: Node) -> list[Unit]:
        self._results.pop(node, None)
        if node.level == 0:
            self._left += 1
            self._queue.appendleft(node)
            return [self.unit(node)]
        return [unit for child in self._children(node) for unit in self._forget(child)]

    def _ready_merge(self) -> Node | None:
        for child in self._results if self._merge else ():
            node = Node(child.level + 1, child.position // 2)
            if child.position % 2 == 0 and node not in self._running and node.level < len(self._widths):
                pair = self._children(node)
                if len(pair) == 2 and pair[1] in self._results:
                    return node
        return None

    def _children(self, node: Node) -> tuple[Node, ...]:
        width = self._widths[node.level - 1]
        first = 2 * node.position
        return tuple(Node(node.level - 1, position) for position in range(first, min(first + 2, width)))

    def _lift(self, node: Node) -> None:
        """Move a result without a neighbour up until it has one."""
        while node.level + 1 < len(self._widths) and node.position == self._widths[node.level] - 1:
            if node.position % 2 == 1:
                return
            above = Node(node.level + 1, node.position // 2)
            self._results[above] = self._results.pop(node)
            node = above

    def _name(self, node: Node) -> str:
        if node.level:
            return f"merging sums (level {node.level}, position {node.position})"
        unit = self.unit(node)
        return f"unit {unit.index} with rows [{unit.start}, {unit.stop})"
