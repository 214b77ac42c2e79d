"""From the configuration and the factors' second moments to what compresses each layer's scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fisher_ray.config import CompressionConfig, MetricConfig
from fisher_ray.errors import ConfigError, DataError
from fisher_ray.gradients import Block, random_basis
from fisher_ray.metric import Plans, choose_bases, plan_compression, zero_sums
from fisher_ray.records import Compression, LayerSketch

MAX_BYTES = 2**31
"""What one of an estimator's arrays, or the metric's eigenvectors, may take."""


def plan(compression: CompressionConfig, metric: MetricConfig, shapes: Mapping[str, tuple[int, int]]) -> Plans:
    """Spread the coordinates over the layers, and see that the metric's matrices are not too large.

    Raises:
        ConfigError: if they are, or as :func:`fisher_ray.metric.plan_compression`.
    """
    plans = plan_compression(compression, shapes)
    dim, width = plans.dim, max(sum_width(plans, metric), min(metric.rank, plans.dim))
    if 8 * dim * width > MAX_BYTES:
        raise ConfigError(
            f"compression gives {dim} coordinates: with metric.estimator {metric.estimator} and rank {metric.rank} the "
            f"metric would hold a matrix of {dim} x {width} numbers, and {MAX_BYTES // 8} are allowed. Lower "
            "compression.dim or metric.rank, give identity layers another kind, take another estimator or fewer "
            "parameters (scores.parameters)."
        )
    return plans


def sum_width(plans: Plans, metric: MetricConfig) -> int:
    """Return how many numbers a coordinate takes in the sums of the metric's estimator, at most."""
    size = min(metric.size or 2 * metric.rank, plans.dim)
    widths = {"exact": plans.dim, "nystrom": size, "frequent_directions": size, "diagonal": 1}
    if metric.structure == "block" and metric.estimator == "exact":
        widths["exact"] = max(entry.dim or plans.shared for entry in plans.layers.values())
    return widths[metric.estimator]


def choose_compression(
    config: CompressionConfig, blocks: Sequence[Block], moments: dict[str, np.ndarray] | None, seed: int
) -> dict[str, Compression]:
    """Return what compresses each layer's scores, in the network's order; layers without coordinates are left out.

    Args:
        config: what is asked for.
        blocks: of the engine.
        moments: merged :class:`fisher_ray.metric.KroneckerSums` arrays, where a layer is of kind ``kronecker``.
        seed: of random bases and sketches.

    Raises:
        ConfigError: as :func:`fisher_ray.metric.plan_compression`.
        DataError: as :func:`fisher_ray.metric.choose_bases`; or if every score is zero.
    """
    shapes = {block.name: block.shape for block in blocks}
    plans = plan_compression(config, shapes)
    found = _without_data(config, plans, blocks, seed)
    if plans.with_moments:
        own = {name: dim for name in plans.with_moments if (dim := plans.layers[name].dim) is not None}
        of_kind = {name: shapes[name] for name in plans.with_moments}
        found |= choose_bases(moments or zero_sums(of_kind), of_kind, plans.shared, own)
    if not found:
        raise DataError("every score is zero: the Fisher metric has no direction. Is the network's output constant?")
    return {name: found[name] for name in shapes if name in found}


def stand_in(config: CompressionConfig, blocks: Sequence[Block]) -> dict[str, Compression]:
    """Return a compression that takes about as much memory as the one that the data will choose.

    A layer of kind ``kronecker`` gets as many columns on either side as if the coordinates of all of them were its own,
    a quarter of its products kept.
    """
    plans = plan_compression(config, {block.name: block.shape for block in blocks})
    found = _without_data(config, plans, blocks, 0)
    for block in blocks:
        if block.name in plans.with_moments:
            dim = plans.layers[block.name].dim or plans.shared
            basis = random_basis(block, 2 * math.isqrt(dim), 2 * math.isqrt(dim), 0)
            found[block.name] = replace(basis, pairs=basis.pairs[: max(1, min(dim, len(basis.pairs) // 4))])
    return found


def _without_data(
    config: CompressionConfig, plans: Plans, blocks: Sequence[Block], seed: int
) -> dict[str, Compression]:
    """Return the compression of the layers whose kind needs to know nothing of the data."""
    found: dict[str, Compression] = {}
    for block in blocks:
        entry = plans.layers[block.name]
        if entry.kind == "kronecker" or not entry.dim:
            continue
        if entry.kind == "random":
            found[block.name] = random_basis(block, *_sides(entry.dim, *block.shape), seed)
            continue
        whole = entry.dim == math.prod(block.shape)  # as many numbers as entries: nothing has to be added up
        share = config.share if entry.kind == "topk" else 1.0
        found[block.name] = LayerSketch(block.name, block.shape, entry.dim, None if whole else seed, share)
    return found


def _sides(dim: int, num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """Return columns of inputs and of outputs, as close to each other as the layer allows, of at most ``dim`` pairs."""
    inputs = min(num_inputs, math.isqrt(dim))
    outputs = min(num_outputs, dim // inputs)
    return min(num_inputs, dim // outputs), outputs
