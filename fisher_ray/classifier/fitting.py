"""Metric, features and ridge regression on tensors, one function each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fisher_ray.classifier.batches import Data, batches, check_data, check_integers
from fisher_ray.classifier.feature_map import CUSTOM, FeatureMap
from fisher_ray.config import CompressionConfig, Kind, LinearConfig, MetricConfig, ScoresConfig
from fisher_ray.data import plan_units
from fisher_ray.errors import DataError, RequestError
from fisher_ray.gradients import Compressor, ScoreEngine, bucketed, likelihood_of, precision_of
from fisher_ray.linear import (
    ClassWeights,
    GramSum,
    LinearWeights,
    best_penalty,
    fit_temperature,
    ridge_path,
    weigh_classes,
)
from fisher_ray.linear.ridge import check_penalties
from fisher_ray.metric import FisherSum, LowRankMetric, plan_compression
from fisher_ray.stages.compression import choose_compression, plan
from fisher_ray.stages.passes import feature_arrays, fisher_pass, kronecker_pass
from fisher_ray.stages.shallow import fit_rows, num_views, score_rows, store_rows
from fisher_ray.store import (
    FeatureStore,
    StoreSpec,
    StoreWriter,
    create_store,
    finished_units,
    open_features,
    seal,
)

Labels = Literal["all", "true", "sampled", "uniform"]
Estimators = Literal["exact", "nystrom", "frequent_directions", "diagonal"]
Structures = Literal["global", "block", "adjacent"]
_CHOICES = {"labels": Labels, "compression": Kind, "estimator": Estimators, "structure": Structures}


def fit_metric(
    model: nn.Module,
    data: Data,
    *,
    labels: Labels = "all",
    likelihood: str | Callable[[Tensor, Tensor], Tensor] = "softmax",
    parameters: str = "*",
    compression: Kind = "kronecker",
    dim: int = 1024,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    share: float = 0.15,
    estimator: Estimators = "exact",
    structure: Structures = "global",
    rank: int | None = None,
    size: int | None = None,
    damping: float | Literal["auto"] | Mapping[str, float] = "auto",
    metric_labels: Labels | None = None,
    draws: int = 1,
    centered: bool = False,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    class_buckets: int | None = None,
    seed: int = 0,
) -> LowRankMetric:
    """Fit a low-rank Fisher metric of ``model`` on ``data``, in this process; ``data`` is read once or twice.

    Args:
        model: network in eval mode, logits ``(B, C)``.
        data: inputs ``(N, ...)``; or an iterable of batches that can be read again, each inputs ``(B, ...)`` or a pair
            ``(inputs, labels)``; or a source of :func:`fisher_ray.data.open_source`.
        labels: whose scores: all classes weighted by ``√p_c``, the true ones, or drawn from ``p`` or uniformly.
        likelihood: what the output says of a label: ``softmax`` (classes), ``gaussian`` (regression), ``bernoulli``
            (several yes-or-no labels), ``next_token`` (output ``(B, T, V)``, the labels are the sequences), or a
            function from output and labels to log-likelihoods ``(B,)``.
        parameters: glob over the parameters' names.
        compression: kind of it; see :class:`fisher_ray.config.CompressionConfig`.
        dim: ``D``; ``identity`` needs none.
        layers: another ``kind`` or ``dim`` for some layers, by glob over their names.
        share: of each layer's entries, those that ``topk`` keeps.
        estimator: of the Fisher in the ``D`` coordinates; see :class:`fisher_ray.config.MetricConfig`.
        structure: of the metric, likewise.
        rank: ``R``; by default ``D``.
        size: of the sketch of ``nystrom`` or ``frequent_directions``; by default twice the rank.
        damping: relative to the mean eigenvalue; ``{"absolute": x}`` in its own unit; or ``auto``: see
            :func:`fisher_ray.metric.held_out_damping`.
        metric_labels: whose scores the metric is of, if not those of ``labels``, which features are made of.
        draws: labels drawn for each sample, where they are drawn.
        centered: whether the mean score's outer product is subtracted.
        precision: of the network's forward and backward, here and where the metric is used; half precisions by
            autocast. Under ``float32`` a network keeps its own dtypes.
        class_buckets: with more classes than this, so many buckets of them with random signs are taken in their place;
            see :class:`fisher_ray.gradients.buckets.ClassBuckets`.
        seed: of drawn labels, random compressions, sketches and buckets.

    Returns:
        The metric; fewer than ``R`` directions where the Fisher has fewer.

    Raises:
        ModelError: if the network cannot be used.
        DataError: if the data gives no, or a non-finite, Fisher matrix.
        RequestError: if an option is wrong, or ``data`` is no tensors or can be read only once.
    """
    _check_choices(labels=labels, compression=compression, estimator=estimator, structure=structure)
    check_data(data)
    scores, seed = ScoresConfig.checked({"labels": labels, "class_buckets": class_buckets}), int(seed)
    buckets = None if scores.class_buckets is None else (scores.class_buckets, seed)
    made = bucketed(likelihood_of(likelihood), buckets)
    engine = ScoreEngine(model, parameters, made, precision_of(precision))
    like, shapes = next(model.parameters()), engine.block_shapes
    compressing = CompressionConfig.checked({"kind": compression, "dim": dim, "layers": layers or {}, "share": share})
    of, rank = metric_labels or labels, plan_compression(compressing, shapes).dim if rank is None else rank
    options = {"rank": rank, "size": size, "damping": damping, "draws": draws, "centered": centered}
    settings = MetricConfig.checked({"estimator": estimator, "structure": structure, "labels": of, **options})
    moments, plans = None, plan(compressing, settings, shapes)
    if plans.with_moments:
        read = batches(data, of, like, likelihood)
        moments = kronecker_pass(engine, plans.with_moments, read, of, seed, _refuse_row, draws=draws)
    bases = choose_compression(compressing, engine.blocks, moments, seed)
    sums = FisherSum(settings, {name: basis.dim for name, basis in bases.items()}, seed)
    compressor, read = Compressor(bases, engine.blocks, engine.like), batches(data, of, like, likelihood)
    arrays = fisher_pass(engine, compressor, sums, read, of, seed, _refuse_row, draws=draws)
    attributes: dict[str, Any] = {"labels": labels, "metric_labels": of, "parameters": engine.selection}
    attributes |= {"estimator": estimator, "structure": structure, "precision": precision}
    attributes["likelihood"] = likelihood if isinstance(likelihood, str) else CUSTOM
    attributes |= {} if buckets is None else {"class_buckets": [*buckets]}
    return LowRankMetric(bases, *sums.decompose(arrays), attributes)


def features(model: nn.Module, metric: LowRankMetric, inputs: Tensor) -> Tensor:
    """Return the whitened features of all classes, ``(B, C, R)``: float32, or float64 if the network is.

    Args:
        model: the network that ``metric`` was fitted on.
        metric: of :func:`fit_metric` or of a run.
        inputs: ``(B, ...)``.

    Raises:
        ModelError: if the metric belongs to another network, or the network cannot be used.
    """
    return FeatureMap(model, metric, views=1)(inputs)[0]


def write_features(
    model: nn.Module,
    metric: LowRankMetric,
    inputs: Tensor,
    url: str,
    *,
    labels: Tensor | None = None,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    chunk_rows: int = 1024,
    codec: Literal["none", "zstd", "blosc"] = "none",
    views: Literal[1, 2] = 1,
    view_mode: Literal["average", "stack"] = "average",
) -> FeatureStore:
    """Write the features of all classes to a sealed store, in this process; a store that was begun is finished.

    Args:
        model: the network that ``metric`` was fitted on.
        metric: what whitens.
        inputs: ``(N, ...)``.
        url: a local path or ``s3://bucket/prefix``; what is there already is kept if it was made of the same network,
            metric, inputs and labels.
        labels: integers ``(N,)``; -1 is stored where there are none.
        dtype: stored type.
        chunk_rows: rows of one chunk.
        codec: of the chunks.
        views: 2 for each input's features and its mirror image's (its last axis reversed).
        view_mode: ``average`` stores their mean; ``stack`` stores each, ``(N, V, C, R)``, which :func:`train_linear`
            takes as a row of its own.

    Raises:
        ModelError: as :func:`features`.
        RequestError: if inputs and labels differ in length, or there are none; vectors are to be mirrored; or
            ``view_mode`` is another.
        StoreError: if ``url`` holds something else.
        StorageError: if it cannot be written.
    """
    labels = torch.full((len(inputs),), -1) if labels is None else labels
    if not len(inputs) or labels.shape != (len(inputs),):
        raise RequestError(f"inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)} are not (N, …) and (N,)")
    check_integers(labels)
    if view_mode not in ("average", "stack"):
        raise RequestError(f"view_mode {view_mode!r} is not one of average, stack")
    stacked = view_mode == "stack"
    mapping = FeatureMap(model, metric, views, stacked=stacked)
    sample, logits, hidden = mapping(inputs[:1])
    width = None if hidden is None else hidden.shape[-1]
    sizes = (sample.shape[-1], sample.shape[-2], logits.shape[1], width)
    arrays = feature_arrays(*sizes, dtype, metric.feature_rms, views if stacked else None)
    attributes = {
        "views": "stacked" if stacked else views,
        "labels": "all",
        "fingerprints": _fingerprints(model, metric, inputs, labels),
    }
    create_store(url, StoreSpec(len(inputs), chunk_rows, chunk_rows, codec, arrays, attributes))
    writer = StoreWriter(url)
    done, units = finished_units(url), plan_units(len(inputs), chunk_rows)
    for unit in units:
        if unit.index not in done:
            rows = slice(unit.start, unit.stop)
            made, logits, hidden = mapping(inputs[rows])
            given = {
                "features": made,
                "logits": logits,
                "labels": labels[rows],
                "index": torch.arange(len(inputs))[rows],
            }
            given |= {} if hidden is None else {"hidden": hidden}
            writer.write_unit(unit, {name: value.cpu().numpy() for name, value in given.items()})
    seal(url, len(units))
    return open_features(url)


def train_linear(
    store: FeatureStore,
    *,
    penalties: Sequence[float] = LinearConfig().penalties,
    validation: float = 0.1,
    hidden: bool = True,
    labels: Tensor | None = None,
    class_weights: ClassWeights = "none",
    seed: int = 0,
) -> LinearWeights:
    """Fit a ridge regression on a feature store, in this process, to the store's labels or to others.

    The penalty and the temperature of the probabilities are chosen on rows held out of the store's; the model is then
    fitted on all rows.

    Args:
        store: of :func:`write_features` or of a run (``features/train.zarr``).
        penalties: grid, relative to the mean diagonal of the standardised Gram matrix.
        validation: share of the rows held out.
        hidden: whether the last hidden layer, where stored, is part of the columns, after the features.
        labels: integers from 0, ``(N,)``, -1 for rows to leave out, instead of the stored ones: any classes, of any
            number. The network is not touched again.
        class_weights: as how many rows each class's rows count: ``none``, as one; ``balanced``, each class the same; or
            weights by class.
        seed: of the choice of rows.

    Returns:
        Weights ``(C, F)`` in the raw columns' units.

    Raises:
        DataError: if a label is missing, or no rows are left to choose the penalty on.
        RequestError: if there is no penalty, one is not positive, ``validation`` is not a share, the features were
            made with the true labels, or ``labels`` or ``class_weights`` are not the rows' and the classes'.
        StoreError: if a chunk is missing or corrupt.
    """
    if store.attributes.get("labels") == "true":
        raise RequestError(
            f"{store.url} holds features of true labels: a model on them would have seen each row's label, which new "
            "rows lack. Write them with the scores of all classes."
        )
    check_penalties(penalties)
    if not penalties or not 0 < validation < 1:
        raise RequestError(
            f"penalties {tuple(penalties)} are not at least one, or validation {validation} not in (0, 1)"
        )
    num_classes = store.arrays["logits"].shape[1]
    if labels is not None:
        check_integers(labels)
        if labels.shape != (store.num_rows,) or not len(labels) or int(labels.min()) < -1 or int(labels.max()) < 0:
            raise RequestError(f"labels {tuple(labels.shape)} are not integers from 0 (-1: none), ({store.num_rows},)")
        num_classes = int(labels.max()) + 1
    rows = partial(store_rows, store, seed=seed, validation=validation, use_hidden=hidden, labels=labels)
    columns = ("features", "hidden") if hidden and "hidden" in store.arrays else ("features",)
    num_columns = sum(math.prod(store.arrays[name].shape[1:]) for name in columns) // num_views(store)
    weights = None
    if class_weights != "none":
        counted = torch.cat([block["labels"] for block in rows("all", use_features=False)])
        weights = weigh_classes(class_weights, torch.bincount(counted.clamp(min=0), minlength=num_classes))
    sums = {part: GramSum.zeros(num_columns, num_classes) for part in ("fit", "validation")}
    for part, total in sums.items():
        for block in rows(part):
            total.add(*fit_rows(block), weights)
    scores, truth = score_rows(rows("validation"), "x", ridge_path(sums["fit"], penalties))
    best, _ = best_penalty(penalties, scores, truth)
    sums["fit"].merge(sums["validation"])
    model = ridge_path(sums["fit"], [penalties[best]])[0]
    return replace(model, temperature=fit_temperature(scores[best], truth))


def _refuse_row(row: int) -> None:
    raise DataError(f"data row {row}: the network makes NaN or infinity of it. Correct it, or leave it out.", row=row)


def _check_choices(**choices: str) -> None:
    for name, value in choices.items():
        if value not in (known := get_args(_CHOICES[name])):
            raise RequestError(f"{name} {value!r} is not one of {', '.join(known)}")


def _fingerprints(model: nn.Module, metric: LowRankMetric, inputs: Tensor, labels: Tensor) -> dict[str, str]:
    return {
        "model": _digest(model.state_dict()),
        "metric": metric.fingerprint,
        "data": _digest({"inputs": inputs, "labels": labels}),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
