"""The shallow model: sums over the feature store, the penalty chosen on validation rows, fit, probe and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError
from fisher_ray.gradients import keyed_uniform
from fisher_ray.linear import (
    Columns,
    ColumnSums,
    GramSum,
    LinearWeights,
    best_penalty,
    feature_columns,
    fit_temperature,
    grid,
    minimise,
    preconditioner,
    ridge_path,
    sum_gradients,
)
from fisher_ray.records import Unit
from fisher_ray.stages.passes import mean_views
from fisher_ray.stages.planning import num_columns
from fisher_ray.stages.workbench import Workbench
from fisher_ray.storage import Storage
from fisher_ray.store import FeatureStore, load_arrays, open_features, save_arrays

BLOCK_ROWS = 2048
"""Rows summed at a time."""
MOST_CONFUSED = 100
"""Classes whose confusions are kept."""
KEPT_BYTES = 2 * 2**30
"""Rows of the last hidden layer up to this size are kept in memory while the probe is fitted."""
_VALIDATION_KEY = 0x5EED


def linear_rows(
    bench: Workbench, store: FeatureStore, part: str, rows: range | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield blocks of a run's rows; see :func:`store_rows`."""
    linear = bench.config.linear
    return store_rows(store, part, rows, seed=bench.config.seed, validation=linear.validation, use_hidden=linear.hidden)


def hidden_rows(bench: Workbench, store: FeatureStore, part: str) -> Iterator[dict[str, Tensor]]:
    """Yield blocks of a run's rows whose ``x`` is the last hidden layer alone; the features are not read."""
    seed, validation = bench.config.seed, bench.config.linear.validation
    return store_rows(store, part, seed=seed, validation=validation, use_features=False, use_hidden=True)


def store_rows(
    store: FeatureStore,
    part: str,
    rows: range | None = None,
    *,
    seed: int,
    validation: float,
    use_features: bool = True,
    use_hidden: bool,
    labels: Tensor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield blocks of rows: ``x`` ``(B, F)``, ``hidden`` (where stored), ``logits``, ``labels``, ``index``.

    Of a store of stacked views, ``x`` is ``(B, V, F)``, and ``hidden`` ``(B, V, H)``: :func:`fit_rows` and
    :func:`mean_scores` take either. Where neither features nor hidden layer are asked for, there is no ``x``.

    Args:
        store: to read from.
        part: ``fit``, ``validation`` (cut from the rows by a hash of seed and sample index) or ``all``.
        rows: of the store; None for all.
        seed: the run's.
        validation: share of the rows held out.
        use_features: whether the features are read, and part of ``x``.
        use_hidden: whether the last hidden layer, where stored, is part of ``x``, after the features.
        labels: instead of the stored ones, by sample index; rows of -1 are left out.
    """
    columns = [*(["features"] if use_features else []), *(["hidden"] if use_hidden else [])]
    wanted = ("features",) if use_features else ()
    names = [name for name in store.arrays if name in (*wanted, "labels", "index", "logits", "hidden")]
    stacked = is_stacked(store)
    waiting: list[dict[str, np.ndarray]] = []
    for chunk in store.iter_chunks(names, rows):
        if labels is not None:
            chunk["labels"] = labels.numpy()[chunk["index"]]
        held = held_out(chunk["index"], seed, validation)
        keep = {"all": np.ones_like(held), "fit": ~held, "validation": held}[part]
        if labels is not None:
            keep = keep & (chunk["labels"] >= 0)
        waiting.append(chunk if keep.all() else {name: value[keep] for name, value in chunk.items()})
        if num_views(store) * sum(len(item["labels"]) for item in waiting) >= BLOCK_ROWS:
            yield _joined(waiting, columns, stacked)
            waiting = []
    if any(len(item["labels"]) for item in waiting):
        yield _joined(waiting, columns, stacked)


def is_stacked(store: FeatureStore) -> bool:
    """Return whether a store holds the features of every view by itself."""
    return store.layout("features").dims[1] == "view"


def num_views(store: FeatureStore) -> int:
    """Return ``V``, how many rows of the linear model a sample of the store is: 1 for averaged views."""
    return store.layout("features").shape[1] if is_stacked(store) else 1


def fit_rows(block: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a block's ``x`` ``(B, F)`` and labels ``(B,)``; each of stacked views is a row of its own, next to it."""
    x, labels = block["x"], block["labels"]
    return (x, labels) if x.ndim == 2 else (x.flatten(0, 1), labels.repeat_interleave(x.shape[1]))


def mean_scores(model: LinearWeights, x: Tensor) -> Tensor:
    """Return a model's scores ``(B, C)`` of ``x`` ``(B, F)``, or their mean over the views of ``(B, V, F)``."""
    scores = model.scores(x)
    return scores if x.ndim == 2 else mean_views(list(scores.unbind(1)))


def held_out(index: np.ndarray, seed: int, validation: float) -> np.ndarray:
    """Return which samples are validation rows, by a hash of seed and sample index.

    Those of a smaller share are among those of a larger one.

    Args:
        index: of the samples, int64 ``(B,)``.
        seed: the run's.
        validation: share of the rows held out.
    """
    return keyed_uniform(seed ^ _VALIDATION_KEY, torch.from_numpy(index)).numpy() < validation


def _joined(parts: list[dict[str, np.ndarray]], columns: list[str], stacked: bool) -> dict[str, Tensor]:
    block = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts[1:] else parts[0]
    names = [name for name in columns if name in block]
    x = {"x": columns_of(block, names, stacked)} if names else {}
    return {**x, **{n: torch.from_numpy(v) for n, v in block.items() if n != "features"}}


def gram_sums(bench: Workbench, unit: Unit, part: str) -> dict[str, np.ndarray]:
    """Sum one leaf's rows of the training store, as :meth:`GramSum.to_arrays` has them."""
    columns = num_columns(bench.config, bench.facts, bench.metric.rank)
    sums = GramSum.zeros(columns, bench.facts.num_classes)
    for block in linear_rows(bench, bench.train_store, part, range(unit.start, unit.stop)):
        sums.add(*fit_rows(block), bench.class_weights)
    return sums.to_arrays()


def columns_of(block: Mapping[str, np.ndarray], names: Sequence[str], stacked: bool) -> Tensor:
    """Return the arrays ``names`` of some rows side by side: ``(B, F)``, or ``(B, V, F)`` of stacked views."""
    chosen = [block[name].reshape(*block[name].shape[: 1 + stacked], -1) for name in names]
    return torch.from_numpy(np.concatenate(chosen, axis=-1) if len(chosen) > 1 else chosen[0])


def column_sums(bench: Workbench, unit: Unit, part: str) -> dict[str, np.ndarray]:
    """Sum one leaf's columns and their squares, as :meth:`ColumnSums.to_arrays` has them."""
    sums, weights = ColumnSums.zeros(num_columns(bench.config, bench.facts, bench.metric.rank)), bench.class_weights
    for block in linear_rows(bench, bench.train_store, part, range(unit.start, unit.stop)):
        x, labels = fit_rows(block)
        sums.add(x, None if weights is None else weights[labels.long()])
    return sums.to_arrays()


def choose_penalty(bench: Workbench, fit: dict[str, np.ndarray]) -> dict[str, Any]:
    """Fit the whole grid on the fitting rows, and score it on the validation rows in one pass.

    Returns:
        ``path``: each ``penalty``, ``rank`` and ``damping`` with its accuracy; the best of these (of equals, the one
        with the largest penalty); ``validation``: its accuracy; ``temperature``: that of its scores.
    """
    linear, sums = bench.config.linear, GramSum.from_arrays(fit)
    tried: list[dict[str, Any]] = []
    models: list[LinearWeights] = []
    for rank, damping in grid(linear.ranks, linear.dampings):
        tried += [{"penalty": penalty, "rank": rank, "damping": damping} for penalty in linear.penalties]
        models += ridge_path(sums, linear.penalties, ridge_columns(bench, rank, damping))
    scores, labels = score_rows(linear_rows(bench, bench.train_store, "validation"), "x", models)
    best, accuracies = best_penalty([model.penalty for model in models], scores, labels)
    path = [{**one, "accuracy": share} for one, share in zip(tried, accuracies, strict=True)]
    chosen = {**tried[best], "validation": accuracies[best]}
    return {"path": path, **chosen, "temperature": fit_temperature(scores[best], labels)}


def ridge_columns(bench: Workbench, rank: int | None, damping: float | None) -> Columns:
    """Return the columns of a rank and a damping that are tried; see :func:`fisher_ray.linear.feature_columns`."""
    metric, config, facts = bench.metric, bench.config, bench.facts
    num_scores = config.scores.num_scores(facts.num_classes)
    num_hidden = (facts.hidden or 0) if config.linear.hidden else 0
    means = torch.cat([part.eigvals.mean().expand_as(part.eigvals) for part in metric.parts])
    return feature_columns(metric.eigvals, num_scores, num_hidden, rank, damping, means)


def fit_ridge(
    bench: Workbench,
    fit: dict[str, np.ndarray],
    validation: dict[str, np.ndarray],
    *,
    penalty: float,
    rank: int | None,
    damping: float | None,
    temperature: float,
) -> dict[str, Any]:
    """Fit on all rows with what was chosen, and write ``linear/weights.zarr``; ``fit`` may be added to."""
    sums = merge_sums(fit, validation)
    model = ridge_path(sums, [penalty], ridge_columns(bench, rank, damping))[0]
    save_weights(bench, "weights", replace(model, temperature=temperature))
    return {"num_rows": round(sums.num_rows), "num_columns": sums.num_columns}


def merge_sums(fit: dict[str, np.ndarray], validation: dict[str, np.ndarray]) -> GramSum:
    """Add the validation rows' sums to the fitting rows', in place where these may be written to."""
    sums = GramSum.from_arrays({n: value if value.flags.writeable else value.copy() for n, value in fit.items()})
    sums.merge(GramSum.from_arrays(validation))
    return sums


def save_sums(bench: Workbench, fit: dict[str, np.ndarray], validation: dict[str, np.ndarray]) -> None:
    """Write ``linear/sums-fit.zarr`` and ``linear/sums-all.zarr``, which the logistic fit starts from.

    ``fit`` may be added to.
    """
    save_arrays(bench.url("linear/sums-fit.zarr"), fit, {"kind": "sums"})
    save_arrays(bench.url("linear/sums-all.zarr"), merge_sums(fit, validation).to_arrays(), {"kind": "sums"})


def save_column_sums(bench: Workbench, fit: dict[str, np.ndarray], validation: dict[str, np.ndarray]) -> None:
    """Write the sums of :func:`column_sums` as :func:`save_sums` does those of :func:`gram_sums`."""
    everything = {name: fit[name] + validation[name] for name in fit}
    save_arrays(bench.url("linear/sums-fit.zarr"), fit, {"kind": "sums"})
    save_arrays(bench.url("linear/sums-all.zarr"), everything, {"kind": "sums"})


def remove_sums(storage: Storage) -> None:
    """Remove what :func:`save_sums` or :func:`save_column_sums` wrote."""
    for part in ("fit", "all"):
        storage.remove(f"linear/sums-{part}.zarr")


def fit_probe(bench: Workbench) -> dict[str, Any]:
    """Fit ridge and logistic regression on the last hidden layer alone; write ``linear/probe-<kind>.zarr``.

    Each kind's penalty is the best on the validation rows; it is then fitted on all rows. The logits' mean over views
    is the linear layer's on the mean hidden layer, so the views are the same as the features'.

    Returns:
        By kind, ``penalty`` and ``validation`` accuracy.
    """
    rows, penalties = _HiddenRows(bench), bench.config.linear.penalties
    fit, everything = (_hidden_sums(bench, rows, part) for part in ("fit", "all"))
    paths: dict[str, Callable[[GramSum, str, Sequence[float]], list[LinearWeights]]] = {
        "ridge": lambda sums, _, values: ridge_path(sums, values),
        "logistic": lambda sums, part, values: [_fit_logistic(bench, rows, sums, value, part) for value in values],
    }
    chosen = {}
    for kind, path in paths.items():
        models = path(fit, "fit", penalties)
        scores, labels = score_rows(rows.of("validation"), "x", models)
        best, accuracies = best_penalty(penalties, scores, labels)
        save_weights(bench, f"probe-{kind}", path(everything, "all", [penalties[best]])[0])
        chosen[kind] = {"penalty": penalties[best], "validation": accuracies[best]}
    return chosen


class _HiddenRows:
    """The last hidden layer's rows: read once if they fit into :data:`KEPT_BYTES`, else whenever they are asked for."""

    def __init__(self, bench: Workbench) -> None:
        self._bench, self._store = bench, bench.train_store
        row_bytes = sum(map(self._store.row_bytes, ("hidden", "logits", "labels", "index")))
        self._keeps = 2 * self._store.num_rows * row_bytes <= KEPT_BYTES  # "all" besides its two parts
        self._kept: dict[str, list[dict[str, Tensor]]] = {}

    def of(self, part: str) -> Iterable[dict[str, Tensor]]:
        """Return blocks as :func:`hidden_rows` yields them."""
        if not self._keeps:
            return hidden_rows(self._bench, self._store, part)
        if part not in self._kept:
            self._kept[part] = list(hidden_rows(self._bench, self._store, part))
        return self._kept[part]


def _hidden_sums(bench: Workbench, rows: _HiddenRows, part: str) -> GramSum:
    sums = GramSum.zeros(int(bench.facts.hidden or 0), bench.facts.num_classes)
    for block in rows.of(part):
        sums.add(*fit_rows(block), bench.class_weights)
    return sums


def _fit_logistic(bench: Workbench, rows: _HiddenRows, sums: GramSum, penalty: float, part: str) -> LinearWeights:
    coordinates = preconditioner(sums, penalty)

    def evaluate(params: Tensor) -> tuple[float, Tensor]:
        blocks = map(fit_rows, rows.of(part))
        _, loss, by_weight, by_bias = sum_gradients(blocks, *coordinates.raw(params), bench.class_weights)
        return coordinates.objective(params, loss, by_weight, by_bias)

    found = minimise(evaluate, coordinates.start(), bench.config.linear.max_steps, 1e-3)
    return coordinates.model(found.params)


def score_rows(
    blocks: Iterable[dict[str, Tensor]], columns: str, models: Sequence[LinearWeights]
) -> tuple[list[Tensor], Tensor]:
    """Return each model's scores ``(N, C)`` on the ``columns`` of all blocks, and the labels ``(N,)``.

    Raises:
        DataError: if there are no rows.
    """
    scores: list[list[Tensor]] = [[] for _ in models]
    labels = []
    for block in blocks:
        labels.append(block["labels"])
        for found, model in zip(scores, models, strict=True):
            found.append(mean_scores(model, block[columns]))
    if not labels:
        raise DataError("no rows were left to score a model on: give more rows, or raise linear.validation")
    return [torch.cat(found) for found in scores], torch.cat(labels)


def evaluate(bench: Workbench) -> dict[str, Any]:
    """Score base network, probes and linear model on the stored test rows, and write ``linear/predictions.zarr``.

    Returns:
        ``total`` rows, ``num_classes``, by model the ``correct`` ones, and of up to :data:`MOST_CONFUSED` classes the
        ``confusion`` of base network and linear model.
    """
    models = {"fisher_linear": ("x", load_weights(bench.url("linear/weights.zarr")))}
    if bench.facts.hidden is not None:
        for kind in ("ridge", "logistic"):
            models[f"linear_probe_{kind}"] = ("hidden", load_weights(bench.url(f"linear/probe-{kind}.zarr")))
    found: dict[str, list[Tensor]] = {name: [] for name in ("labels", "index", "base", *models)}
    for block in linear_rows(bench, open_features(bench.url("features/test.zarr")), "all"):
        for name in ("labels", "index"):
            found[name].append(block[name])
        found["base"].append(block["logits"])
        for name, (columns, model) in models.items():
            found[name].append(mean_scores(model, block[columns]))
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    attributes = {"kind": "predictions", "scores": ["base", *models]}
    save_arrays(bench.url("linear/predictions.zarr"), {k: v.numpy() for k, v in joined.items()}, attributes)
    labels, num_classes = joined["labels"], bench.facts.num_classes
    taken = {name: joined[name].argmax(1) for name in ("base", *models)}
    correct = {name: int((found == labels).sum()) for name, found in taken.items()}
    told = ("base", "fisher_linear") if num_classes <= MOST_CONFUSED else ()
    confusion = {name: confusion_matrix(labels, taken[name], num_classes).tolist() for name in told}
    return {"total": len(labels), "num_classes": num_classes, "correct": correct, "confusion": confusion}


def confusion_matrix(labels: Tensor, taken: Tensor, num_classes: int) -> Tensor:
    """Return the samples by class and by what they are taken for, int64 ``(C, C)``."""
    return torch.bincount(labels * num_classes + taken, minlength=num_classes**2).reshape(num_classes, num_classes)


def save_weights(bench: Workbench, name: str, weights: LinearWeights) -> None:
    """Write ``linear/<name>.zarr``."""
    arrays = {"weight": weights.weight.numpy(), "bias": weights.bias.numpy()}
    attributes = {"kind": "linear", "penalty": weights.penalty, "temperature": weights.temperature}
    save_arrays(bench.url(f"linear/{name}.zarr"), arrays, attributes)


def load_weights(url: str) -> LinearWeights:
    """Read what :func:`save_weights` wrote."""
    arrays, attributes = load_arrays(url)
    weight, bias = torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"])
    return LinearWeights(weight, bias, float(attributes["penalty"]), float(attributes["temperature"]))
