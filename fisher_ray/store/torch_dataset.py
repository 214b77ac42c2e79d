"""A feature store as a dataset of PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fisher_ray.errors import RequestError
from fisher_ray.store.batches import Batches
from fisher_ray.store.reader import FeatureStore, open_features


class FeatureDataset(IterableDataset[dict[str, Tensor]]):
    """Batches of a feature store, for a ``DataLoader`` with ``batch_size=None``.

    Every row comes once in an epoch, to one of the readers: the ranks of ``torch.distributed``, where it is in use, and
    each rank's DataLoader workers. (Ranks may get different numbers of batches: see ``Join`` in PyTorch.)

    Args:
        store: a feature store, or its URL.
        batch_size: rows of a batch.
        names: of the arrays.
        rank: of this process; None asks ``torch.distributed``, and is 0 without it.
        world_size: how many processes there are; None as ``rank``.
        options: ``shuffle``, ``seed``, ``epoch``, ``buffer_rows``, ``start``, ``drop_last``, as
            :meth:`FeatureStore.iter_batches` has them.
    """

    def __init__(
        self,
        store: FeatureStore | str,
        batch_size: int,
        names: Sequence[str] = ("features", "labels"),
        *,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        """See the class.

        Raises:
            RequestError: if an argument is out of range.
            StoreError: if the store is not whole, or there is no such array.
        """
        self._store = open_features(store) if isinstance(store, str) else store
        used = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = (torch.distributed.get_rank() if used else 0) if rank is None else rank
        self._world = (torch.distributed.get_world_size() if used else 1) if world_size is None else world_size
        self._given: dict[str, Any] = {"batch_size": batch_size, "names": names, **options}
        self._batches(0, 1)  # refuses now what would be refused in a worker

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Give the next pass the order of ``epoch``, from this process's batch ``start`` on."""
        self._given |= {"epoch": epoch, "start": start}

    @property
    def num_batches(self) -> int:
        """How many batches this process gets with one DataLoader worker, or none."""
        return len(self._batches(0, 1))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches, as tensors.

        Raises:
            RequestError: if ``start`` is not 0 with several DataLoader workers, whose batches are not one sequence.
            StoreError: if a chunk is missing or corrupt.
            StorageError: if storage does not answer.
        """
        info = get_worker_info()
        reader, readers = (info.id, info.num_workers) if info is not None else (0, 1)
        if readers > 1 and self._given.get("start"):
            raise RequestError(
                f"start {self._given['start']}: with {readers} DataLoader workers batches are not one sequence. Resume "
                "with num_workers 0 or 1; rows are read ahead by a thread in any case."
            )
        for batch in self._batches(reader, readers):
            yield {name: torch.from_numpy(values) for name, values in batch.items()}

    def _batches(self, reader: int, readers: int) -> Batches:
        whole: dict[str, Any] = {"rank": self._rank * readers + reader, "world_size": self._world * readers}
        return self._store.iter_batches(**self._given, **whole)
