"""Features of the scores of all targets on tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fisher_ray.classifier.batches import MICRO_BATCH, as_batch
from fisher_ray.errors import RequestError
from fisher_ray.gradients import Compressor, ScoreEngine, likelihood_of, precision_of
from fisher_ray.metric import LowRankMetric
from fisher_ray.stages.passes import batch_features

CUSTOM = "custom"
"""What stands in a metric's attributes for a likelihood of the user's own."""


class FeatureMap:
    """Features of all classes (or other targets) of one network under one metric, micro-batch by micro-batch.

    Args:
        model: the network that ``metric`` was fitted on.
        metric: what whitens.
        views: 2 averages over each input and its mirror image.

    Raises:
        ModelError: if the metric belongs to another network, or the network cannot be used.
        RequestError: if ``views`` is neither 1 nor 2.
    """

    def __init__(self, model: nn.Module, metric: LowRankMetric, views: int) -> None:
        """See the class."""
        if views not in (1, 2):
            raise RequestError(f"views {views} is not 1 or 2")
        self._metric, self._views = metric, views
        likelihood = metric.attributes.get("likelihood", "softmax")
        if likelihood == CUSTOM:
            raise RequestError(
                "features are of the scores of all targets, which a likelihood of your own does not give"
            )
        precision = precision_of(metric.attributes.get("precision", "float32"))
        parameters = metric.attributes.get("parameters", "*")
        self._engine = ScoreEngine(model, parameters, likelihood_of(likelihood), precision)
        self._compressors: dict[tuple[torch.dtype, torch.device], Compressor] = {}
        self._compressor()  # refuses another network

    def _compressor(self) -> Compressor:
        """Return what compresses where the network is now, made once and kept."""
        like = self._engine.like
        key = like.dtype, like.device
        if key not in self._compressors:
            self._compressors[key] = Compressor(self._metric.bases, self._engine.blocks, like)
        return self._compressors[key]

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return features ``(B, C, R)``, logits ``(B, C)`` and the last hidden layer ``(B, H)`` or None.

        Raises:
            RequestError: if vectors are to be mirrored.
        """
        if self._views == 2 and inputs.ndim < 3:
            shape = tuple(inputs.shape[1:])
            raise RequestError(f"views 2 mirrors pictures, and a sample has shape {shape}. Give views=1.")
        if not len(inputs):
            made, logits, hidden = self(inputs.new_zeros(1, *inputs.shape[1:]))
            return made[:0], logits[:0], None if hidden is None else hidden[:0]
        with torch.inference_mode(False):  # scores need the graph that the mode would leave out
            return self._features(inputs.clone() if inputs.is_inference() else inputs)

    def _features(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        like = next(self._engine.model.parameters())
        compressor = self._compressor()
        blocks = [
            batch_features(
                self._engine,
                compressor,
                self._metric,
                as_batch(part, None, like),
                labels="all",
                seed=0,
                views=self._views,
            )
            for part in torch.split(inputs, MICRO_BATCH)
        ]
        kept = [block for block in blocks if block is not None]
        hidden = [block.hidden for block in kept if block.hidden is not None]
        logits = torch.cat([block.logits for block in kept])
        return torch.cat([block.values for block in kept]), logits, torch.cat(hidden) if hidden else None
