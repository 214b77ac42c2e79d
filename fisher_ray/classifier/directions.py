"""Between features and directions in the space of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fisher_ray.gradients import Compressor, ScoreEngine
from fisher_ray.metric import LowRankMetric


def project(model: nn.Module, metric: LowRankMetric, vector: Mapping[str, Tensor]) -> Tensor:
    """Return the features ``(Λ + δI)^(−½) Uᵀ C v`` of a direction ``v`` in the space of parameters, ``(R,)``.

    Its dot product with a sample's features is the damped Fisher product of ``v`` and the sample's score.

    Args:
        model: the network that ``metric`` was fitted on.
        metric: of :func:`fisher_ray.fit_metric` or of a run.
        vector: by parameter name, of the parameters' shapes: a gradient, a step of training, a difference of weights.

    Raises:
        ModelError: if the metric belongs to another network, or a parameter that it uses is missing.
    """
    engine, compressor = _parts(model, metric)
    blocks = [block for block in engine.blocks if block.name in metric.bases]
    with torch.no_grad():
        like = engine.like
        parts = [compressor.compress_gradient(block, block.join(vector).to(like)) for block in blocks]
        return metric.transform(torch.cat(parts))


def parameter_directions(model: nn.Module, metric: LowRankMetric, features: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Take features back to the space of parameters, one parameter after the other.

    That is ``Cᵀ U (Λ + δI)^½ φ``: of a sample's features, the part of its score that the metric sees; of a linear
    model's weights, the direction in which the network's parameters would move. All ``P`` are never held at once.

    Args:
        model: the network that ``metric`` was fitted on.
        metric: of :func:`fisher_ray.fit_metric` or of a run.
        features: ``(..., R)``.

    Yields:
        Names of parameters and ``(..., *shape)``, in the network's order; parameters of layers without coordinates are
        left out.

    Raises:
        ModelError: when the first is asked for, if the metric belongs to another network, or ``R`` is not its rank.
        RequestError: likewise, if a layer was compressed by ``topk``, which cannot be undone.
    """
    engine, compressor = _parts(model, metric)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    compressed = metric.inverse_transform(features.detach())
    blocks = [block for block in engine.blocks if block.name in metric.bases]
    last = {piece.parameter: block.name for block in blocks for piece in block.pieces}
    leading = (slice(None),) * (features.ndim - 1)
    found: dict[str, Tensor] = {}
    for block in blocks:
        for piece, part in block.split(compressor.transpose(block.name, compressed)):
            if piece.parameter not in found:
                found[piece.parameter] = part.new_zeros(*features.shape[:-1], *shapes[piece.parameter])
            found[piece.parameter][leading if piece.rows is None else (*leading, piece.rows)] += part
        for name in [name for name in found if last[name] == block.name]:
            yield name, found.pop(name)


def _parts(model: nn.Module, metric: LowRankMetric) -> tuple[ScoreEngine, Compressor]:
    engine = ScoreEngine(model, metric.attributes.get("parameters", "*"))
    return engine, Compressor(metric.bases, engine.blocks, engine.like)
