"""Questions to small runs in this process, as the workers answer them."""

from __future__ import annotations

from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np

from fisher_ray.config import ScoreConfig
from fisher_ray.records import Unit
from fisher_ray.stages import Workbench, planning, shallow
from fisher_ray.stages.attribution import ridge, search
from fisher_ray.store import FeatureStore, create_store, open_features, seal
from tests.reference import attribution as reference
from tests.stages.small_runs import NUM_CLASSES, fit_metric, merged, small_bench, write_features

PENALTY = 0.02
FOLDER = "scores/asked"


def featured(folder: Path, *, bad: tuple[int, ...] = (), **sections: Any) -> Workbench:
    """Return the workbench of a run that has its metric and the features of both splits, in float32."""
    bench = small_bench(folder, bad=bad, **sections)
    fit_metric(bench)
    for name, split in (("train", "shallow"), ("test", "test")):
        write_features(bench, name, split)
    return bench


def train_units(bench: Workbench) -> list[Unit]:
    return planning.split_units(bench.config, bench.facts, "shallow")


def fit_system(bench: Workbench, folder: str = FOLDER, penalty: float = PENALTY, **chosen: Any) -> None:
    """Write the ridge system that scores and audits ask for."""
    columns = planning.num_columns(bench.config, bench.facts, bench.metric.rank)
    units = [planning.linear_units(bench.config, bench.facts, columns, part) for part in ("fit", "validation")]
    parts = [
        merged([shallow.gram_sums(bench, unit, part) for unit in some])
        for part, some in zip(("fit", "validation"), units, strict=True)
    ]
    ridge.save_ridge(
        bench,
        *parts,
        folder=folder,
        **{"penalty": penalty, "rank": None, "damping": None, "temperature": 1.0, **chosen},
    )


def prepare(bench: Workbench, by: str) -> None:
    """Do what comes before the search."""
    if by == "ridge":
        fit_system(bench)
    if by == "class_gap":
        sums = merged([search.sum_class_gaps(bench, unit, 1)[1] for unit in train_units(bench)])
        search.save_class_gap(bench, sums, folder=FOLDER)


def searched(bench: Workbench, folder: str = FOLDER, **request: Any) -> list[dict[str, np.ndarray]]:
    """Search all training units for every block of the queries, and merge what is found."""
    asked = ScoreConfig.checked(request)
    found = []
    store = search.query_store(bench, asked, folder)
    for block in search.query_blocks(asked, store.num_rows, store.row_bytes("features")):
        bench._kept.pop("queries", None)  # of another question, which has workers of its own
        given = {"request": asked.model_dump(mode="json"), "folder": folder, "start": block.start, "stop": block.stop}
        parts = [search.search_rows(bench, unit, 1, **given)[1] for unit in train_units(bench)]
        found.append(reduce(partial(search.merge_found, bench), parts))
    return found


def all_scores(bench: Workbench, **request: Any) -> np.ndarray:
    """Return the scores ``(Q, N)`` of all training rows, NaN where there is none; every row is listed at both ends."""
    top = open_features(bench.url("features/train.zarr")).num_rows
    dense = []
    for found in searched(bench, **request, top=top):
        ends = []
        for end in ("highest", "lowest"):
            scores = np.full((len(found[f"{end}-rows"]), top + 1), np.nan)
            np.put_along_axis(scores, found[f"{end}-rows"], found[f"{end}-scores"].astype(np.float64), axis=1)
            ends.append(scores[:, :top])  # the last is of what is not there
        np.testing.assert_array_equal(*ends)
        dense.append(ends[0])
    return np.concatenate(dense)


def full_scores(bench: Workbench, folder: str, num_queries: int, **request: Any) -> FeatureStore:
    """Search with ``full``, and return the store of the scores."""
    train, url = bench.train_store, bench.url(f"{folder}/{search.SCORES}")
    create_store(url, search.score_spec(train, num_queries, bench.config.runtime.unit_rows, {}))
    searched(bench, folder, **request, full=True)
    seal(url, len(train_units(bench)))
    return open_features(url)


def stored(bench: Workbench, name: str) -> dict[str, np.ndarray]:
    """Return what a feature store holds, without skipped rows, in float64."""
    store = open_features(bench.url(f"features/{name}.zarr"))
    read = store.read_kept([*store.arrays], 0, store.num_rows)
    return {key: value.astype(np.float64 if value.dtype.kind == "f" else np.int64) for key, value in read.items()}


def columns(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Return the linear model's columns ``(N, F)``: features and last hidden layer."""
    return np.column_stack([rows["features"].reshape(len(rows["labels"]), -1), rows["hidden"]])


class Refits:
    """The run's ridge regression, fitted on all of its training rows, and anew without each."""

    def __init__(self, bench: Workbench, penalty: float = PENALTY, counts: np.ndarray | None = None) -> None:
        rows = stored(bench, "train")
        labels, x = rows["labels"], columns(rows)
        self._x, self.targets = x, np.eye(NUM_CLASSES)[labels]
        self.counts = np.ones(len(x)) if counts is None else counts
        self.z, self.ridge = reference.standardised(x, self.counts), penalty * self.counts.sum()
        self.whole = self._fit()
        self.without = [self._fit(row) for row in range(len(x))]

    def _fit(self, without: int | None = None):
        return reference.fit(self.z, self.targets, self.counts, self.ridge, without)

    def standardised(self, x: np.ndarray) -> np.ndarray:
        """Standardise other rows as the training rows are."""
        many = np.concatenate([self._x, x])
        weights = np.concatenate([self.counts, np.zeros(len(x))])
        return reference.standardised(many, weights)[len(self._x) :]


def balanced(labels: np.ndarray) -> np.ndarray:
    """As how many rows each row counts when every class counts the same."""
    sizes = np.bincount(labels, minlength=NUM_CLASSES)
    return (len(labels) / NUM_CLASSES / sizes)[labels]
