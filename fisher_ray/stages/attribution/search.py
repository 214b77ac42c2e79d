"""Scores of every training sample for a block of queries: products of blocks, of which the best are kept."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.config import ScoreConfig
from fisher_ray.errors import ConfigError, DataError
from fisher_ray.metric import ClassGapSum, Normalisation, SparseMetric
from fisher_ray.records import Receipt, Unit
from fisher_ray.stages.attribution.best import NUM_BINS, Arrays, Best, count_cosines, merge_best
from fisher_ray.stages.attribution.novelty import NormMoments, norm_weights, square_norms
from fisher_ray.stages.attribution.ridge import RIDGE, RidgeInfluence, load_ridge, row_weights
from fisher_ray.stages.attribution.vectors import CLASS_GAP, feature_rows, vectors
from fisher_ray.stages.shallow import num_views, store_rows
from fisher_ray.stages.tasks import UnitLog
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import SEAL, ArraySpec, FeatureStore, StoreSpec, open_features

QUERY_BYTES = 2**29
"""Of the vectors of the queries that are compared with the training rows in one go."""
SOLVED_COPIES = 6
"""Of a query's vector that are held while its system is solved, those in float64 counted twice."""
NORM_ROWS = 256
"""Training rows of a block, about, that say what norms are usual: more would be a pass over memory of their own."""
COSINES = ("cosine", "class_gap")
"""What scores are by where they are cosines."""
SCORES = "scores.zarr"
"""The scores of all training rows, in the folder."""
QUERIES = "queries.zarr"
"""The features of queries from elsewhere, in the folder."""


@dataclass(frozen=True)
class Asked:
    """Some of the queries, and what is asked of them; plain values.

    Attributes:
        request: of type :class:`ScoreConfig`, as a mapping.
        folder: of the scores, in the run folder.
        start: first row of the queries' store.
        stop: the one behind the last.
    """

    request: dict[str, Any]
    folder: str
    start: int
    stop: int

    @property
    def config(self) -> ScoreConfig:
        """The request."""
        return ScoreConfig.checked(self.request)


@dataclass(frozen=True)
class Queries:
    """Queries that have been read.

    Attributes:
        index: their rows in their split, ``(Q,)``.
        labels: ``(Q,)``.
        scores: makes scores ``(Q, B)`` of a block of training rows.
    """

    index: Tensor
    labels: Tensor
    scores: Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class QueryVectors:
    """Queries as vectors.

    Attributes:
        index: their rows in their split, ``(Q,)``.
        labels: ``(Q,)``.
        vectors: ``(Q, K)``; see :func:`~fisher_ray.stages.attribution.vectors.vectors`.
    """

    index: Tensor
    labels: Tensor
    vectors: Tensor


def query_store(bench: Workbench, request: ScoreConfig, folder: str) -> FeatureStore:
    """Open the store of the queries' features."""
    return open_features(bench.url(request.store or f"{folder}/{QUERIES}"))


def blocks_of(bench: Workbench, store: FeatureStore, by: str, rows: range) -> Iterator[dict[str, Tensor]]:
    """Yield blocks of a store's rows with the columns that scores ``by`` are made of."""
    use_hidden = by == "ridge" and bench.config.linear.hidden
    return store_rows(store, "all", rows, seed=0, validation=0.0, use_hidden=use_hidden)


def num_features(store: FeatureStore) -> int:
    """Return the features of one sample, of one view."""
    return math.prod(store.layout("features").shape[1:]) // num_views(store)


def norms_of(bench: Workbench, store: FeatureStore, block: dict[str, Tensor]) -> Tensor:
    """Return the :func:`square_norms` of a block's samples."""
    width = num_features(store)
    weights = bench.keep("norm weights", store.url, lambda _: norm_weights(bench.metric, width))
    return square_norms(feature_rows(block)[:, :width], weights)


@contextmanager
def stored_rows(
    bench: Workbench, store: FeatureStore, by: str, unit: Unit, log: UnitLog
) -> Iterator[Iterator[dict[str, Tensor]]]:
    """Yield a unit's :func:`blocks_of` when it is its turn to compute; reading begins at once."""
    start = time.monotonic()
    blocks = blocks_of(bench, store, by, range(unit.start, unit.stop))
    first = next(blocks, None)
    log.seconds["read"] = time.monotonic() - start
    with bench.turn:
        start = time.monotonic()
        yield itertools.chain([] if first is None else [first], blocks)
        log.seconds["compute"] = time.monotonic() - start


def target_classes(block: dict[str, Tensor], target: str) -> Tensor:
    """Return the classes that scores of a block's samples are about, int64 ``(B,)``."""
    return block["labels"] if target == "label" else block["logits"].argmax(1)


def read_queries(bench: Workbench, asked: Asked) -> Queries:
    """Read queries, and prepare what compares them with training rows.

    Raises:
        DataError: if all were skipped.
    """
    request, folder = asked.config, asked.folder
    if request.by == "ridge":
        blocks = _query_blocks(bench, asked)
        index, labels, classes = _told(blocks, request.target)
        system = bench.keep("ridge", f"{folder}/{RIDGE}", load_ridge)
        ridge = RidgeInfluence(system, torch.cat([system.standardised(block["x"]) for block in blocks]), classes)
        return Queries(index, labels, lambda block: ridge.scores(block["x"], *_row_labels(bench, block)))
    found = read_vectors(bench, asked)
    left = found.vectors / (bench.train_store.num_rows if request.by == "influence" else 1)

    def scores(block: dict[str, Tensor]) -> Tensor:
        return left @ vectors(bench, request.by, block, block["labels"], folder).mT

    return Queries(found.index, found.labels, scores)


def read_vectors(bench: Workbench, asked: Asked) -> QueryVectors:
    """Read queries as vectors; errors as :func:`read_queries`."""
    request, blocks = asked.config, _query_blocks(bench, asked)
    index, labels, classes = _told(blocks, request.target)
    parts = torch.split(classes, [len(block["labels"]) for block in blocks])
    made = [vectors(bench, request.by, block, part, asked.folder) for block, part in zip(blocks, parts, strict=True)]
    return QueryVectors(index, labels, torch.cat(made))


def _query_blocks(bench: Workbench, asked: Asked) -> list[dict[str, Tensor]]:
    store = query_store(bench, asked.config, asked.folder)
    blocks = [*blocks_of(bench, store, asked.config.by, range(asked.start, asked.stop))]
    if not blocks:
        raise DataError(f"of the queries [{asked.start}, {asked.stop}) none is left: all were skipped")
    return blocks


def _told(blocks: list[dict[str, Tensor]], target: str) -> tuple[Tensor, Tensor, Tensor]:
    index, labels = (torch.cat([block[name] for block in blocks]) for name in ("index", "labels"))
    return index, labels, torch.cat([target_classes(block, target) for block in blocks])


def _row_labels(bench: Workbench, block: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return block["labels"], row_weights(bench, block["labels"])


def search_rows(
    bench: Workbench, unit: Unit, attempt: int, *, request: dict[str, Any], folder: str, start: int, stop: int
) -> tuple[Receipt, Arrays]:
    """Score a unit's training rows for the queries ``[start, stop)``.

    Returns:
        The arrays of :class:`Best`, ``moments`` of :class:`NormMoments`, and of cosines ``pairs``: see
        :func:`count_cosines`. With ``full``, the unit of :data:`SCORES` is written, too.

    Raises:
        DataError: if a score is NaN or infinite.
    """
    asked, log = Asked(request, folder, start, stop), UnitLog()
    config, parts, pairs = asked.config, list[Arrays](), np.zeros((2, NUM_BINS), np.int64)
    store = bench.train_store
    with stored_rows(bench, store, config.by, unit, log) as blocks:
        queries = bench.keep("queries", f"{folder}/[{start}, {stop})", lambda _: read_queries(bench, asked))
        best, moments = Best(len(queries.index), config.top), NormMoments()
        for block in blocks:
            scores, rows, labels = queries.scores(block), block["index"], block["labels"]
            refuse_infinite(scores)
            same = rows == queries.index[:, None] if config.queries == "shallow" else None
            best.add(scores, rows, labels, same)
            moments.add(norms_of(bench, store, {"x": block["x"][:: max(1, len(rows) // NORM_ROWS)]}))
            if config.by in COSINES:
                pairs += count_cosines(scores, labels == queries.labels[:, None], same)
            if config.full:
                parts.append({"index": rows.numpy(), "scores": scores.mT.numpy()})
    arrays = best.to_arrays() | {"moments": moments.to_array()} | ({"pairs": pairs} if config.by in COSINES else {})
    written = not config.full or bench.storage.exists(f"{folder}/{SCORES}/{SEAL}")  # of a stage that is run again
    num_bytes = 0 if written else write_rows(bench, unit, attempt, f"{folder}/{SCORES}", parts)
    return log.receipt(unit, attempt, num_bytes), arrays


def refuse_infinite(scores: Tensor) -> None:
    """Refuse scores that cannot be compared.

    Raises:
        DataError: if one is NaN or infinite.
    """
    if not bool(scores.isfinite().all()):
        raise DataError("a score is NaN or infinite: verify the feature stores, or store features as float32")


def write_rows(bench: Workbench, unit: Unit, attempt: int, place: str, parts: list[Arrays]) -> int:
    """Write what was found of a unit's training rows, block by block; those skipped in the features are so here.

    Returns:
        The bytes written.
    """
    writer, skipped = bench.store_writer(place), bench.train_store.skipped
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else writer.no_rows()
    reasons = {row: skipped[row] for row in range(unit.start, unit.stop) if row in skipped}
    return writer.write_unit(unit, arrays, attempt=attempt, skipped=reasons)


def merge_found(bench: Workbench, left: Arrays, right: Arrays) -> Arrays:
    """Merge two results of :func:`search_rows`."""
    added = {name: left[name] + right[name] for name in ("pairs", "moments") if name in left}
    return merge_best(left, right) | added


def score_spec(store: FeatureStore, num_queries: int, unit_rows: int, attributes: dict[str, Any]) -> StoreSpec:
    """Describe the store of all scores, ``(N, Q)``, whose chunks are those of the training rows ``store``."""
    arrays = {
        "scores": ArraySpec((num_queries,), "float32", ("sample", "query")),
        "index": ArraySpec((), "int64", ("sample",)),
    }
    return StoreSpec(store.num_rows, unit_rows, store.chunk_rows, "none", arrays, attributes)


def query_blocks(request: ScoreConfig, num_rows: int, row_bytes: int) -> list[range]:
    """Cut the queries' rows into blocks whose vectors take :data:`QUERY_BYTES` at most.

    Args:
        request: what is asked.
        num_rows: of the queries' split.
        row_bytes: of one sample's features in float32.

    Raises:
        ConfigError: if there are fewer rows than ``request.rows`` says, or too many for ``full``.
    """
    first, last = request.rows or (0, num_rows)
    if last > num_rows:
        raise ConfigError(f"rows [{first}, {last}) go beyond the queries' {num_rows}. Correct them.")
    size = max(1, QUERY_BYTES // (row_bytes * (SOLVED_COPIES if request.by == "ridge" else 1)))
    if request.full and last - first > size:
        raise ConfigError(
            f"full: {size:,} queries can be kept with all their scores, and there are more. Ask for fewer with rows, "
            "or leave full out."
        )
    return [range(start, min(start + size, last)) for start in range(first, last, size)]


def sum_class_gaps(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, Arrays]:
    """Sum what class gaps need of a unit's training rows, their features of length one."""
    log, store, normalisation = UnitLog(), bench.train_store, Normalisation(l2=True)
    sums = ClassGapSum(num_features(store), bench.facts.num_classes)
    with stored_rows(bench, store, "class_gap", unit, log) as blocks:
        for block in blocks:
            sums.add(normalisation.apply(feature_rows(block)), block["labels"])
    return log.receipt(unit, attempt), sums.to_arrays()


def save_class_gap(bench: Workbench, sums: Arrays, *, folder: str) -> dict[str, Any]:
    """Choose the coordinates of ``class_gap``, and write the metric."""
    metric = SparseMetric.from_sums(sums, Normalisation(l2=True))
    metric.save(bench.url(f"{folder}/{CLASS_GAP}"))
    return {"num_coordinates": len(metric.coordinates), "of": metric.dim}
