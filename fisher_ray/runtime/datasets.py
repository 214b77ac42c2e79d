"""A feature store as a dataset of Ray Data's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.data import Dataset, Datasource, ReadTask, read_datasource
from ray.data.block import BlockAccessor, BlockMetadata

from fisher_ray.errors import RequestError
from fisher_ray.store import FeatureStore, open_features


def to_ray_dataset(store: FeatureStore | str, names: Sequence[str] = ("features", "labels", "index")) -> Dataset:
    """Return a Ray Data dataset of a feature store's rows, those skipped left out; read where they are needed.

    Args:
        store: a feature store, or its URL, which every machine has to reach.
        names: of the arrays; each becomes a column, of tensors where a row has a shape.

    Raises:
        StoreError: if the store is not whole, or there is no such array.
    """
    found = open_features(store) if isinstance(store, str) else store
    for name in names:
        found.layout(name)
    if not names:
        raise RequestError("no array is named. Give at least one.")
    dataset: Dataset = read_datasource(_FeatureSource(found, list(names)))
    return dataset


class _FeatureSource(Datasource):
    """Reads whole chunks, one block each; several in one task where fewer tasks are asked for."""

    def __init__(self, store: FeatureStore, names: list[str]) -> None:
        self._store, self._names = store, names

    def estimate_inmemory_data_size(self) -> int:
        """Return the bytes of all rows."""
        return sum(self._chunk_bytes(chunk) for chunk in range(self._store.num_chunks))

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
        """Return tasks that read consecutive chunks."""
        width = -(-self._store.num_chunks // max(1, min(parallelism, self._store.num_chunks)))
        starts = range(0, self._store.num_chunks, width)
        return [self._task(range(start, min(start + width, self._store.num_chunks))) for start in starts]

    def _task(self, chunks: range) -> ReadTask:
        store, names = self._store, self._names

        def read() -> Any:
            for chunk in chunks:
                rows = store.rows(chunk)
                yield BlockAccessor.batch_to_block(store.read_kept(names, rows.start, rows.stop))

        num_rows = sum(map(store.num_kept, chunks))
        num_bytes = sum(map(self._chunk_bytes, chunks))
        return ReadTask(read, BlockMetadata(num_rows=num_rows, size_bytes=num_bytes, input_files=None, exec_stats=None))

    def _chunk_bytes(self, chunk: int) -> int:
        row = sum(self._store.row_bytes(name) for name in self._names)
        return row * self._store.num_kept(chunk)
