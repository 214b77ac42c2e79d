"""What waits to be handed out, in order: found and taken off in an instant however much waits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from fisher_ray.runtime.tree import Node


class Waiting:
    """Nodes in order, each once.

    Args:
        nodes: in order.
    """

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        """See the class."""
        self._nodes = OrderedDict[Node, None]((node, None) for node in nodes)

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._nodes)

    @property
    def first(self) -> Node:
        """The one that comes next."""
        return next(iter(self._nodes))

    def take(self) -> Node:
        """Take the first one off."""
        return self._nodes.popitem(last=False)[0]

    def append(self, node: Node) -> None:
        """Put one behind all others."""
        self._nodes.setdefault(node)

    def put_first(self, node: Node) -> None:
        """Put one before all others; one that waits already comes forward."""
        self._nodes[node] = None
        self._nodes.move_to_end(node, last=False)

    def discard(self, node: Node) -> None:
        """Take one off, if it waits."""
        self._nodes.pop(node, None)
