"""Features of the scores of all targets on tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fisher_ray.classifier.batches import MICRO_BATCH, as_batch, to_like
from fisher_ray.config import ScoresConfig
from fisher_ray.errors import RequestError
from fisher_ray.gradients import Compressor, ScoreEngine, bucketed, likelihood_of, precision_of
from fisher_ray.metric import LowRankMetric
from fisher_ray.records import Batch
from fisher_ray.stages.passes import batch_features, compressed_scores, mean_views

CUSTOM = "custom"
"""What stands in a metric's attributes for a likelihood of the user's own."""


class FeatureMap:
    """Features of all classes (or other targets) of one network under one metric, micro-batch by micro-batch.

    Args:
        model: the network that ``metric`` was fitted on.
        metric: what whitens.
        views: 2 averages over each input and its mirror image.
        stacked: whether features and hidden layers of all views are given side by side, not averaged.

    Raises:
        ModelError: if the metric belongs to another network, or the network cannot be used.
        RequestError: if ``views`` is neither 1 nor 2.
    """

    def __init__(self, model: nn.Module, metric: LowRankMetric, views: int, *, stacked: bool = False) -> None:
        """See the class."""
        if views not in (1, 2):
            raise RequestError(f"views {views} is not 1 or 2")
        self._metric, self._views, self._stacked = metric, views, stacked
        likelihood = metric.attributes.get("likelihood", "softmax")
        if likelihood == CUSTOM:
            raise RequestError(
                "features are of the scores of all targets, which a likelihood of your own does not give"
            )
        precision = precision_of(metric.attributes.get("precision", "float32"))
        parameters = metric.attributes.get("parameters", "*")
        buckets = metric.attributes.get("class_buckets")
        self._scores = ScoresConfig(class_buckets=None if buckets is None else buckets[0])
        made = bucketed(likelihood_of(likelihood), buckets)
        self._engine = ScoreEngine(model, parameters, made, precision)
        self._compressors: dict[tuple[torch.dtype, torch.device], Compressor] = {}
        self._compressor()  # refuses another network

    def num_scores(self, num_classes: int) -> int:
        """Return how many scores a sample of so many classes has: fewer with buckets."""
        return self._scores.num_scores(num_classes)

    def _compressor(self) -> Compressor:
        """Return what compresses where the network is now, made once and kept."""
        like = self._engine.like
        key = like.dtype, like.device
        if key not in self._compressors:
            self._compressors[key] = Compressor(self._metric.bases, self._engine.blocks, like)
        return self._compressors[key]

    def __call__(
        self, inputs: Tensor, transform: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return features ``(B, C, R)``, logits ``(B, C)`` and the last hidden layer ``(B, H)`` or None.

        Of buckets of classes there are as many features as :meth:`num_scores` says instead of ``C``. Of stacked views,
        features are ``(B, V, C, R)`` and the last hidden layer ``(B, V, H)``.

        Args:
            inputs: ``(B, ...)``.
            transform: what to make, instead of features, of compressed scores ``(B, C, D)`` averaged over the views;
                linear in them.

        Raises:
            RequestError: if vectors are to be mirrored.
        """
        transform = transform or self._metric.transform
        self._check(inputs)
        if not len(inputs):
            made, logits, hidden = self(inputs.new_zeros(1, *inputs.shape[1:]), transform)
            return made[:0], logits[:0], None if hidden is None else hidden[:0]
        with torch.inference_mode(False):  # scores need the graph that the mode would leave out
            return self._made(inputs.clone() if inputs.is_inference() else inputs, transform)

    def _check(self, inputs: Tensor) -> None:
        if self._views == 2 and inputs.ndim < 3:
            shape = tuple(inputs.shape[1:])
            raise RequestError(f"views 2 mirrors pictures, and a sample has shape {shape}. Give views=1.")

    def compressed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return compressed scores ``(B, C, D)`` and the last hidden layer ``(B, H)`` or None, averaged over the views.

        Of the whole batch at once, so that it can be traced.

        Raises:
            RequestError: as :meth:`__call__`.
        """
        self._check(inputs)
        engine, unused = self._engine, torch.zeros(0, dtype=torch.int64)
        inputs = to_like(inputs, next(engine.model.parameters()))
        batches = [Batch(view, unused, unused) for view in (inputs, inputs.flip(-1))[: self._views]]
        found = [compressed_scores(engine, self._compressor(), batch, "all", 0) for batch in batches]
        hidden = [layer for _, layer, _ in found if layer is not None]
        return mean_views([values for _, _, values in found]), mean_views(hidden) if hidden else None

    def _made(self, inputs: Tensor, transform: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        like = next(self._engine.model.parameters())
        compressor = self._compressor()
        blocks = [
            batch_features(
                self._engine,
                compressor,
                transform,
                as_batch(part, None, like),
                labels="all",
                seed=0,
                views=self._views,
                stacked=self._stacked,
            )
            for part in torch.split(inputs, MICRO_BATCH)
        ]
        kept = [block for block in blocks if block is not None]
        hidden = [block.hidden for block in kept if block.hidden is not None]
        logits = torch.cat([block.logits for block in kept])
        return torch.cat([block.values for block in kept]), logits, torch.cat(hidden) if hidden else None
