"""A linear model on features as weights of the compressed scores, so that prediction does without the features."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fisher_ray.errors import ModelError
from fisher_ray.linear import LinearWeights
from fisher_ray.metric import LowRankMetric


class FoldedWeights:
    """Linear weights with the whitening folded in.

    Features are linear in the compressed scores, and so is what the model makes of them: ``w · (W s) = (Wᵀ w) · s``.
    The folded weights are computed in float64, once for each dtype and device that they are asked for in.

    Args:
        metric: whose features the model was fitted on.
        weights: of ``C · R`` feature columns, with or without the last hidden layer's after them.
    """

    def __init__(self, metric: LowRankMetric, weights: LinearWeights) -> None:
        """See the class."""
        self._metric, self._weights = metric, weights
        self._folded: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def weigh(self, compressed: Tensor) -> Tensor:
        """Return what compressed scores ``(B, C, D)`` add to the outputs, ``(B, O)``.

        Raises:
            ModelError: if the model has not the columns of these features.
        """
        num_classes = compressed.shape[1]
        key = num_classes, compressed.dtype, compressed.device
        if key not in self._folded:
            with torch.inference_mode(False):  # a tensor made in that mode could never take part in a gradient
                self._folded[key] = self._fold(num_classes).to(compressed).contiguous()
        return compressed.flatten(1) @ self._folded[key].T

    def _fold(self, num_classes: int) -> Tensor:
        width = num_classes * self._metric.rank
        weight = self._weights.weight[:, :width].double().cpu()
        if weight.shape[1] < width:
            self._refuse(width)
        return self._metric.fold(weight.reshape(len(weight), num_classes, self._metric.rank)).flatten(1)

    def finish(self, weighed: Tensor, num_scores: int, hidden: Tensor | None) -> Tensor:
        """Return the outputs ``(B, O)``.

        Args:
            weighed: see :meth:`weigh`.
            num_scores: ``C``, or as many as there are buckets of classes.
            hidden: the last hidden layer, ``(B, H)``, or None.

        Raises:
            ModelError: as :meth:`weigh`.
        """
        width = num_scores * self._metric.rank
        others = self._weights.weight[:, width:].to(weighed)
        out = weighed + self._weights.bias.to(weighed)
        if not others.shape[1]:
            return out
        if hidden is None or hidden.shape[1] != others.shape[1]:
            self._refuse(width + (0 if hidden is None else hidden.shape[1]))
        return torch.addmm(out, hidden.to(weighed), others.T)

    def _refuse(self, num_columns: int) -> NoReturn:
        raise ModelError(
            f"the linear model has {self._weights.weight.shape[1]} columns, the features {num_columns}: "
            "it was fitted on the features of another metric"
        )
