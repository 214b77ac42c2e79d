"""Merged sums of a pass that are kept on storage while it runs, so that a resumed pass does not start over."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from fisher_ray.runtime.tree import Node
from fisher_ray.storage import Storage
from fisher_ray.store import SEAL

FOLDER = "sums"
NUM_REMOVERS = 8
"""Sums that are removed at a time, beside the driver's work: on object storage each takes several requests."""


class Checkpoints:
    """The kept sums of one pass, each a group of arrays named by its node of the merge tree.

    Args:
        storage: the run folder.
        name: of the pass.
        every_units: as many units' sum, and every larger one, is kept; rounded up to a power of two. None keeps none.
    """

    def __init__(self, storage: Storage, name: str, every_units: int | None) -> None:
        """Touch nothing yet."""
        self._storage, self._folder = storage, f"{FOLDER}/{name}"
        self._level = None if every_units is None else (every_units - 1).bit_length()
        self._removers: ThreadPoolExecutor | None = None
        self._removals: dict[Node, Future[None]] = {}

    def found(self) -> list[Node]:
        """Return the nodes whose sums are there, without those that are part of another."""
        if self._level is None:
            return []
        wait(self._removals.values())
        sealed = re.compile(rf"{re.escape(self._folder)}/(\d+)-(\d+)\.zarr/{re.escape(SEAL)}")
        found = (sealed.fullmatch(name) for name in self._storage.list(self._folder))
        nodes = [Node(int(match[1]), int(match[2])) for match in found if match is not None]
        return [node for node in nodes if not any(other.covers(node) for other in nodes)]

    def place(self, node: Node) -> str | None:
        """Return where a node's sum is to be kept; None if it is not. One that is being removed is gone by then."""
        removal = self._removals.pop(node, None)
        if removal is not None and not removal.cancel():
            wait([removal])  # if it failed, what is left is written over
        return None if self._level is None or node.level < self._level else self.url(node)

    def url(self, node: Node) -> str:
        """Return where a node's sum is kept."""
        return f"{self._storage.url.rstrip('/')}/{self._name(node)}"

    def remove(self, nodes: Iterable[Node]) -> None:
        """Remove what is part of a larger sum by now, in threads of its own; nobody waits for it."""
        for node in nodes:
            if self._removers is None:
                self._removers = ThreadPoolExecutor(NUM_REMOVERS, "remove-sums")
            self._removals[node] = self._removers.submit(self._storage.remove, self._name(node))

    def settle(self) -> list[str]:
        """Remove no more: what is left goes with the whole folder when the stage is sealed.

        Returns:
            Why something could not be removed.
        """
        if self._removers is None:
            return []
        self._removers.shutdown(cancel_futures=True)
        ended = [removal for removal in self._removals.values() if not removal.cancelled()]
        self._removers, self._removals = None, {}
        return [str(error) for removal in ended if (error := removal.exception()) is not None]

    def _name(self, node: Node) -> str:
        return f"{self._folder}/{node.level}-{node.position}.zarr"


def remove_checkpoints(storage: Storage) -> None:
    """Remove every pass' kept sums."""
    storage.remove(FOLDER)
