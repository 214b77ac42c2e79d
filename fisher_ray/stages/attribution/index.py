"""Approximate search through FAISS: an index that is trained once, and a part of it for every unit of training rows."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from fisher_ray.config import By
from fisher_ray.errors import DataError, RequestError
from fisher_ray.records import Receipt, Unit
from fisher_ray.stages.attribution.best import Arrays, Best
from fisher_ray.stages.attribution.search import (
    Asked,
    blocks_of,
    num_features,
    read_vectors,
    refuse_infinite,
    stored_rows,
)
from fisher_ray.stages.attribution.vectors import vectors
from fisher_ray.stages.tasks import UnitLog
from fisher_ray.stages.workbench import Workbench

TRAINED = "trained.faiss"
"""The index without rows, in its folder."""
TRAINING_BYTES = 2**30
"""Of the vectors that an index is trained on, at most."""


def load_faiss() -> Any:
    """Import FAISS.

    Raises:
        RequestError: if it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise RequestError(
            "an index needs FAISS, which is not installed here. Install it, here and on the workers: pip install "
            "faiss-cpu; or search exactly, without --index."
        ) from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def part_name(unit: int) -> str:
    """Return the file name of a unit's part of an index."""
    return f"unit-{unit:08d}.faiss"


def train_index(bench: Workbench, *, factory: str, by: By, folder: str) -> dict[str, Any]:
    """Train an index on the first training rows, and write it without rows.

    Args:
        bench: of the run.
        factory: as of ``faiss.index_factory``, such as ``IVF256,Flat``.
        by: ``kernel`` or ``cosine``.
        folder: of the index, in the run folder.

    Returns:
        ``dim``, and ``trained_on``: how many rows.

    Raises:
        RequestError: if FAISS is not installed, or cannot make such an index.
    """
    faiss, store = load_faiss(), bench.train_store
    dim = num_features(store)
    wanted = min(store.num_rows, max(1, TRAINING_BYTES // (4 * dim)))
    blocks = blocks_of(bench, store, by, range(wanted))
    rows = torch.cat([vectors(bench, by, block, block["labels"], folder) for block in blocks]).numpy()
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(np.ascontiguousarray(rows))
    except RuntimeError as error:
        raise RequestError(
            f"FAISS makes no index {factory!r} of {dim} dimensions, trained on {len(rows)} rows: "
            f"{_reason(error)}. Give another one, such as IVF64,Flat."
        ) from None
    bench.storage.write_bytes(f"{folder}/{TRAINED}", faiss.serialize_index(index).tobytes())
    return {"dim": dim, "trained_on": len(rows)}


def fill_index(bench: Workbench, unit: Unit, attempt: int, *, by: By, folder: str) -> tuple[Receipt, None]:
    """Write the part of an index that has a unit's training rows."""
    faiss, log = load_faiss(), UnitLog()
    with stored_rows(bench, bench.train_store, by, unit, log) as blocks:
        index = _read(faiss, f"{folder}/{TRAINED}", bench.storage.read_bytes(f"{folder}/{TRAINED}"))
        for block in blocks:
            rows = vectors(bench, by, block, block["labels"], folder)
            try:
                index.add(np.ascontiguousarray(rows.numpy()))
            except RuntimeError as error:
                what = f"FAISS adds no rows to such an index: {_reason(error)}"
                raise RequestError(f"{what}. Give another one, such as IVF64,Flat.") from None
    start, raw = time.monotonic(), faiss.serialize_index(index).tobytes()
    bench.storage.write_bytes(f"{folder}/{part_name(unit.index)}", raw)
    log.seconds["write"] = time.monotonic() - start
    return log.receipt(unit, attempt, len(raw)), None


def search_index(
    bench: Workbench,
    unit: Unit,
    attempt: int,
    *,
    request: dict[str, Any],
    folder: str,
    start: int,
    stop: int,
    index: str,
) -> tuple[Receipt, Arrays]:
    """Look up the queries ``[start, stop)`` in a unit's part of an index.

    Args:
        bench: of the run.
        unit: of training rows.
        attempt: from 1.
        request: as of :func:`~fisher_ray.stages.attribution.search.search_rows`.
        folder: of the scores.
        start: of the queries.
        stop: of the queries.
        index: folder of the index, in the run folder.

    Returns:
        The arrays of :class:`Best`, whose lowest scores are not there.
    """
    faiss, log, asked = load_faiss(), UnitLog(), Asked(request, folder, start, stop)
    config, began = asked.config, time.monotonic()
    name = f"{index}/{part_name(unit.index)}"
    raw = bench.storage.read_bytes(name)
    kept = bench.train_store.read_kept(["index", "labels"], unit.start, unit.stop)
    rows, labels = torch.from_numpy(kept["index"]), torch.from_numpy(kept["labels"])
    log.seconds["read"] = time.monotonic() - began
    with bench.turn:
        began = time.monotonic()
        queries = bench.keep("queries", f"{folder}/[{start}, {stop})", lambda _: read_vectors(bench, asked))
        part = _read(faiss, name, raw)
        if part.ntotal != len(rows):
            what = f"{name} has {part.ntotal} rows of unit {unit.index}, the features {len(rows)}"
            raise DataError(f"{what}. Remove {index}; it is made anew.")
        if config.index_parameters is not None:
            try:
                faiss.ParameterSpace().set_index_parameters(part, config.index_parameters)
            except RuntimeError as error:
                what = f"index_parameters {config.index_parameters!r}"
                raise RequestError(f"{what}: {_reason(error)}. Such as nprobe=16.") from None
        own = 1 if config.queries == "shallow" else 0
        found, places = part.search(np.ascontiguousarray(queries.vectors.numpy()), config.top + own)
        refuse_infinite(torch.from_numpy(found)[torch.from_numpy(places) >= 0])
        best = Best(len(queries.index), config.top)
        best.add_found(torch.from_numpy(found), torch.from_numpy(places), rows, labels, queries.index if own else None)
        log.seconds["compute"] = time.monotonic() - began
    return log.receipt(unit, attempt), best.to_arrays()


def _read(faiss: Any, name: str, raw: bytes) -> Any:
    try:
        return faiss.deserialize_index(np.frombuffer(raw, np.uint8))
    except RuntimeError as error:
        what = f"{name} is damaged: {_reason(error)}"
        raise DataError(f"{what}. Remove {name.rpartition('/')[0]}; it is made anew.") from None


def _reason(error: RuntimeError) -> str:
    """Return what FAISS says, without where in its code."""
    return str(error).rpartition(": ")[2]
