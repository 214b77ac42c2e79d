"""Batches of a feature store's rows: in order or shuffled, for one reader of several, from any batch on."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from fisher_ray.errors import RequestError
from fisher_ray.prefetch import prefetch

if TYPE_CHECKING:
    from fisher_ray.store.reader import FeatureStore

Batch = dict[str, np.ndarray]


class Batches:
    """An iterable of batches, each a mapping from array names to rows; every ``for`` begins anew.

    The order depends on the store, ``seed``, ``epoch``, ``buffer_rows`` and ``world_size`` alone: chunks in a random
    order are dealt out to the readers, and the rows of so many chunks as hold ``buffer_rows`` are mixed. Every row that
    was not skipped comes once, to one reader; of a store without its seal, every such row of its finished units. While
    a batch is worked with, the next rows are read.

    Args:
        store: to read from.
        batch_size: rows of a batch; the last one has fewer.
        names: of the arrays.
        shuffle: random order, otherwise the store's.
        seed: of the order.
        epoch: another order for each.
        buffer_rows: rows that are mixed with each other, and read at once; at least a chunk's.
        rank: this reader's number.
        world_size: how many readers there are.
        start: batches of this reader to leave out, as those of before a resume: they are not read.
        drop_last: leave out a last batch of fewer rows.
        only: of every row of the store, bool ``(num_rows,)``, whether it takes part; None for all.

    Raises:
        RequestError: if an argument is out of range.
        StoreError: if there is no such array.
    """

    def __init__(
        self,
        store: FeatureStore,
        batch_size: int,
        names: Sequence[str],
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        buffer_rows: int = 4096,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        drop_last: bool = False,
        only: np.ndarray | None = None,
    ) -> None:
        """See the class."""
        if min(batch_size, buffer_rows, world_size) < 1 or min(seed, epoch, start) < 0 or not 0 <= rank < world_size:
            raise RequestError(
                f"batch_size {batch_size}, buffer_rows {buffer_rows} and world_size {world_size} have to be positive; "
                f"seed {seed}, epoch {epoch} and start {start} not negative; rank {rank} within the world's size"
            )
        if not names:
            raise RequestError("names are none: give the arrays that batches are to have")
        self._store, self._batch_size, self._names = store, batch_size, list(names)
        self._shuffle, self._seed, self._epoch = shuffle, seed, epoch
        self._start, self._drop_last, self._only = start, drop_last, only
        if only is not None and (only.shape, only.dtype) != ((store.num_rows,), np.dtype(bool)):
            raise RequestError(f"only is {only.dtype} {only.shape}, not one bool for each of {store.num_rows} rows")
        for name in self._names:
            store.layout(name)
        chunks = store.chunks[self._permutation(len(store.chunks), 0)] if shuffle else store.chunks
        mine, width = chunks[rank::world_size], -(-buffer_rows // store.chunk_rows)
        self._groups = [mine[first : first + width].tolist() for first in range(0, len(mine), width)]

    def __len__(self) -> int:
        """Return how many batches there are from ``start`` on."""
        rows = sum(map(self._num_rows, self._groups))
        batches = rows // self._batch_size if self._drop_last else -(-rows // self._batch_size)
        return max(batches - self._start, 0)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the batches.

        Raises:
            StoreError: if a chunk is missing or corrupt.
            StorageError: if storage does not answer.
        """
        skip, groups = self._start * self._batch_size, list(self._groups)
        while groups and skip >= (rows := self._num_rows(groups[0])):
            skip -= rows
            groups.pop(0)
        rest: Batch = {}
        with closing(prefetch((self._read(group) for group in groups), depth=1)) as read:
            for mixed in read:
                block = {name: values[skip:] for name, values in mixed.items()}
                skip = 0
                joined = {
                    name: np.concatenate([rest[name], values]) if rest else values for name, values in block.items()
                }
                rows = len(next(iter(joined.values())))
                whole = rows - rows % self._batch_size
                for first in range(0, whole, self._batch_size):
                    yield {name: values[first : first + self._batch_size] for name, values in joined.items()}
                rest = {name: values[whole:] for name, values in joined.items()} if whole < rows else {}
        if rest and not self._drop_last:
            yield rest

    def _read(self, group: list[int]) -> Batch:
        parts = [self._read_chunk(chunk) for chunk in group]
        block = {name: np.concatenate([part[name] for part in parts]) for name in self._names}
        if not self._shuffle:
            return block
        order = self._permutation(self._num_rows(group), 1 + group[0])
        return {name: values[order] for name, values in block.items()}

    def _read_chunk(self, chunk: int) -> Batch:
        rows = self._store.rows(chunk)
        part = self._store.read_kept(self._names, rows.start, rows.stop)
        if self._only is None:
            return part
        chosen = self._only[self._store.kept_rows(chunk)]
        return {name: values[chosen] for name, values in part.items()}

    def _num_rows(self, group: list[int]) -> int:
        if self._only is None:
            return sum(map(self._store.num_kept, group))
        return sum(int(self._only[self._store.kept_rows(chunk)].sum()) for chunk in group)

    def _permutation(self, size: int, stream: int) -> np.ndarray:
        """Return a random order, the same with every version of NumPy: raw bits are, its own permutations are not."""
        bits = np.random.Philox(key=np.array([self._seed, self._epoch], np.uint64), counter=[0, 0, 0, stream])
        return np.argsort(bits.random_raw(size), kind="stable")
