"""The fixed tree along which the results of units are merged."""

from __future__ import annotations

from typing import NamedTuple


class Node(NamedTuple):
    """One node of the merge tree: a unit's own result at level 0, a merge of two neighbours above.

    Attributes:
        level: 0 for units.
        position: from the left.
    """

    level: int
    position: int

    @property
    def first_unit(self) -> int:
        """The position of the first unit below."""
        return self.position << self.level

    def covers(self, below: Node) -> bool:
        """Whether another node's result is part of this one's."""
        return self.level > below.level and below.position >> (self.level - below.level) == self.position


class Tree:
    """Joins neighbours level by level; a last one without a neighbour moves up as it is.

    Args:
        num_units: at level 0.
    """

    def __init__(self, num_units: int) -> None:
        """See the class."""
        self._widths = [num_units]
        while self._widths[-1] > 1:
            self._widths.append(-(-self._widths[-1] // 2))

    @property
    def root(self) -> Node:
        """The node of the whole sum."""
        return Node(len(self._widths) - 1, 0)

    def children(self, node: Node) -> tuple[Node, ...]:
        """Return what a node is merged from: two nodes, or the one that moves up; none at level 0."""
        if not node.level:
            return ()
        width, first = self._widths[node.level - 1], 2 * node.position
        return tuple(Node(node.level - 1, position) for position in range(first, min(first + 2, width)))

    def above(self, node: Node) -> Node | None:
        """Return the node that one is part of; None for the root."""
        return None if node == self.root else Node(node.level + 1, node.position // 2)

    def moves_up(self, node: Node) -> bool:
        """Whether a node has no neighbour to be merged with."""
        is_last = node.position == self._widths[node.level] - 1
        return node != self.root and is_last and node.position % 2 == 0
