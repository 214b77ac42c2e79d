"""Rows of a feature store as vectors whose dot products are the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_ray.config import By, Config
from fisher_ray.metric import SparseMetric
from fisher_ray.stages.passes import mean_views
from fisher_ray.stages.workbench import Workbench

CLASS_GAP = "class-gap.zarr"
"""The sparse metric of ``class_gap``, in the folder of the scores."""


def feature_rows(block: dict[str, Tensor]) -> Tensor:
    """Return a block's features ``(B, F)``, those of stacked views averaged."""
    x = block["x"]
    return x if x.ndim == 2 else mean_views(list(x.unbind(1)))


def vectors(bench: Workbench, by: By, block: dict[str, Tensor], classes: Tensor, folder: str) -> Tensor:
    """Return the vectors of a block's samples, float32 ``(B, K)``.

    Args:
        bench: of the run.
        by: any but ``ridge``.
        block: of :func:`~fisher_ray.stages.shallow.store_rows`, features alone.
        classes: of ``influence``, whose score is meant, int64 ``(B,)``.
        folder: of the scores, in the run folder.
    """
    x = feature_rows(block)
    if by == "kernel":
        return x
    if by == "cosine":
        return unit_length(x)
    if by == "class_gap":
        metric: SparseMetric = bench.keep("class gap", f"{folder}/{CLASS_GAP}", SparseMetric.load)
        return unit_length(metric.transform(x))
    return label_scores(x, block["logits"], classes, bench.config.scores.labels)


def unit_length(x: Tensor) -> Tensor:
    """Return vectors ``(B, K)`` over their lengths; those of zeros stay."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / lengths.clamp_min(torch.finfo(x.dtype).tiny)


def has_label_scores(config: Config, num_classes: int) -> bool:
    """Return whether a run's features are of known classes, so that :func:`label_scores` can be had of them."""
    scores = config.scores
    return scores.labels == "true" or (scores.labels == "all" and scores.num_scores(num_classes) == num_classes)


def label_scores(x: Tensor, logits: Tensor, classes: Tensor, labels: str) -> Tensor:
    """Return the whitened score of one class of each sample, ``(Λ + δ)^(−½) Uᵀ s_c``.

    Features of all classes are weighted by ``√p_c``, which is taken out again. In float16 a probability below 1e-12
    leaves less than three digits of it. Of averaged views, both the features and the logits are means.

    Args:
        x: features, ``(B, C · R)``, or ``(B, R)`` of true labels.
        logits: ``(B, C)``.
        classes: int64 ``(B,)``.
        labels: ``scores.labels`` of the run, ``all`` or ``true``.

    Returns:
        ``(B, R)``, in the dtype of ``x``.
    """
    if labels == "true":
        return x
    rows, classes = torch.arange(len(x)), classes.long()
    chosen = x.reshape(len(x), logits.shape[1], -1)[rows, classes]
    root = (0.5 * logits.double().log_softmax(dim=1)[rows, classes]).exp()
    tiny = torch.finfo(torch.float64).tiny
    return (chosen.double() / root.clamp_min(tiny)[:, None]).to(x.dtype)
