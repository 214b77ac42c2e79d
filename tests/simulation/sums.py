"""Sums: of the fixed tree, and those that are kept on the world's storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fisher_ray.runtime.tree import Node
from tests.simulation.world import World

Sum = TypeVar("Sum")


class Checkpoints:
    """Sums that are kept on the world's storage, by their nodes.

    Args:
        world: with the storage.
        level: of the smallest that are kept.
    """

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

    def settle(self) -> list[str]:
        """Nothing is under way."""
        return []


def as_text(pair: list[str]) -> str:
    """Merge sums that are text."""
    return f"({'+'.join(pair)})" if len(pair) == 2 else pair[0]


def merged(sums: list[Sum], merge: Callable[[list[Sum]], Sum]) -> Sum:
    """The fixed tree's sum of some, each merge of a pair, or of one that is left over."""
    while len(sums) > 1:
        sums = [merge(sums[i : i + 2]) for i in range(0, len(sums), 2)]
    return sums[0]
