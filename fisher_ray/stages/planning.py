"""What the passes cut their rows into, from the configuration and the facts alone."""

from __future__ import annotations

import math
from typing import Any

from fisher_ray.config import Config
from fisher_ray.data import choose_units, plan_units
from fisher_ray.metric import plan_compression
from fisher_ray.records import Unit
from fisher_ray.stages.compression import sum_width
from fisher_ray.stages.facts import Facts
from fisher_ray.stages.gradnet.entries import num_entries
from fisher_ray.stages.gradnet.network import network_shape, num_kept

MIN_LEAF_ROWS = 4096
"""Rows of one Gram sum at least: fewer are not worth moving a matrix for."""
STREAMED_ROWS = 4096
"""Samples that each rank of a streamed fit reads, and mixes with each other, at a time; at least a chunk's."""
READ_COPIES = 4
"""Of these: read, mixed, joined to what was left, and those read ahead."""
STATE_COPIES = 10
"""Of a streamed fit's weights: parameters, two means of gradients, and what a step makes of them."""


def split_units(config: Config, facts: Facts, split: str) -> list[Unit]:
    """Return the units of a split."""
    return plan_units(facts.num_rows[split], config.runtime.unit_rows)


def metric_units(config: Config, facts: Facts) -> list[Unit]:
    """Return the units that the metric is fitted on."""
    return choose_units(split_units(config, facts, "shallow"), config.metric.fraction)


def linear_units(config: Config, facts: Facts, num_columns: int, part: str) -> list[Unit]:
    """Return the units of one part's linear pass: with so many of its rows that summing outweighs moving the matrix.

    They are of one size, and their number is the nearest power of two, so that workers end together. Adding up a Gram
    matrix of ``F`` columns costs what ``F / 2`` rows of products cost in memory traffic.

    Args:
        config: the run's.
        facts: what the first look found.
        num_columns: ``F``.
        part: ``fit``, or ``validation``, which has fewer of each unit's rows.
    """
    held, num_rows = config.linear.validation, facts.num_rows["shallow"]
    share = {"fit": 1 - held, "validation": held}[part]
    enough = max(MIN_LEAF_ROWS, num_columns // 2) / share
    return plan_units(num_rows, math.ceil(num_rows / 2 ** max(0, round(math.log2(num_rows / enough)))))


def num_features(config: Config, facts: Facts, rank: int) -> int:
    """Return the features of one sample: ``C · R``, fewer with buckets, or ``R`` for one label a sample."""
    return rank * config.scores.num_scores(facts.num_classes)


def num_columns(config: Config, facts: Facts, rank: int) -> int:
    """Return ``F``, the linear model's columns: the features and, if asked for, the last hidden layer."""
    return num_features(config, facts, rank) + ((facts.hidden or 0) if config.linear.hidden else 0)


def moment_bytes(config: Config, facts: Facts) -> int:
    """Return the size of the sum of the factors' second moments, of the layers that are compressed by them."""
    layers = plan_compression(config.compression, facts.block_shapes).with_moments
    return 8 * sum(outputs**2 + inputs**2 for outputs, inputs in (facts.block_shapes[name] for name in layers))


def gram_bytes(num_columns: int) -> int:
    """Return the size of the linear model's Gram matrix."""
    return 8 * num_columns**2


def describe_run(config: Config, facts: Facts) -> dict[str, Any]:
    """Return what a run would do: units, memory, bytes and objects, in plain values.

    Memory is a worker's largest arrays together, besides Python and torch themselves.
    """
    found = {"output": config.output, "samples": dict(facts.num_rows), "parameters": facts.num_parameters}
    fisher = {} if config.linear.model == "gradnet" else _describe_fisher(config, facts)
    gradnet = {} if config.gradnet is None else {"gradnet": _describe_gradnet(config, facts)}
    return {**found, **fisher, **gradnet}


def _describe_fisher(config: Config, facts: Facts) -> dict[str, Any]:
    rank = min(config.metric.rank, num_coordinates(config, facts))
    columns, features = num_columns(config, facts, rank), num_features(config, facts, rank)
    units = {
        "metric": len(metric_units(config, facts)),
        "features/train": len(split_units(config, facts, "shallow")),
        "features/test": len(split_units(config, facts, "test")),
        "linear": sum(len(linear_units(config, facts, columns, part)) for part in ("fit", "validation")),
    }
    arrays = 4 if facts.hidden is None else 5
    metadata = 2 * (arrays + 2)  # of each array and the group, and the seal, in both stores
    file_rows = config.store.shard_rows or config.store.chunk_rows
    chunks = sum(-(-facts.num_rows[split] // file_rows) for split in ("shallow", "test"))
    return {
        "compressed_coordinates": num_coordinates(config, facts),
        "features_per_sample": features,
        "linear_columns": columns,
        "units": units,
        "micro_batch": facts.micro_batch,
        "worker_memory_bytes": _worker_bytes(config, facts, features, columns),
        "feature_bytes": _stored_bytes(config, facts, features),
        "feature_objects": arrays * chunks + units["features/train"] + units["features/test"] + metadata,
    }


def _stored_bytes(config: Config, facts: Facts, features: int) -> int:
    """Return the size of both feature stores' arrays, each one's last chunk being whole, before compression."""
    views, chunk = config.linear.num_stacked or 1, config.store.chunk_rows
    wide = features * (4 if config.store.dtype == "float32" else 2) + 4 * (facts.hidden or 0)
    row = views * wide + 4 * facts.num_classes + 8 + 8  # and the logits, the label and the index
    return sum(-(-facts.num_rows[split] // chunk) * chunk * row for split in ("shallow", "test"))


def _describe_gradnet(config: Config, facts: Facts) -> dict[str, Any]:
    section, rows = config.gradnet_section, facts.num_rows["shallow"]
    shape, entries = network_shape(section, facts.gradnet_shapes, facts.num_classes), num_entries(config)
    row_entries = entries * num_kept(config, facts)
    ranged = choose_units(split_units(config, facts, "shallow"), section.range_fraction)
    tested = facts.num_rows["test"] + round(section.validation * rows)
    return {
        "coordinates": shape.dim,
        "entries_kept": num_kept(config, facts),
        "widths": list(shape.widths),
        "parameters": shape.num_parameters,
        "gradients": {
            "ranges": entries * sum(map(len, ranged)),
            "entries": entries * rows,
            "prediction": facts.num_classes * config.linear.views * tested,
        },
        "entry_bytes": rows * row_entries * (8 if config.store.dtype == "float32" else 6),
        "worker_memory_bytes": {
            "entries": 8 * config.runtime.unit_rows * row_entries,
            "training": 2 * 16 * section.buffer_rows * row_entries + 12 * shape.num_parameters,
        },
    }


def num_coordinates(config: Config, facts: Facts) -> int:
    """Return ``D``, the coordinates that all layers' scores are compressed to."""
    return plan_compression(config.compression, facts.block_shapes).dim


def _worker_bytes(config: Config, facts: Facts, features: int, columns: int) -> dict[str, int]:
    dim, hidden = num_coordinates(config, facts), facts.hidden or 0
    width = sum_width(plan_compression(config.compression, facts.block_shapes), config.metric)
    factors = sum(outputs**2 + inputs**2 for outputs, inputs in facts.block_shapes.values())
    scores = config.scores.num_scores(facts.num_classes)
    linear = 8 * 8 * columns**2  # sums: four in the object store, and four of its own, while it solves
    if config.linear.solver == "minibatch":
        read = 4 * max(STREAMED_ROWS, config.store.chunk_rows) * (config.linear.num_stacked or 1)
        models = 8 * facts.num_classes * (len(config.linear.penalties) + STATE_COPIES)
        linear = columns * (READ_COPIES * read + models)
    return {
        "metric": 8 * (2 * factors + 4 * dim * width) + 4 * facts.micro_batch * scores * dim,
        "features": 8 * config.runtime.unit_rows * (config.linear.num_stacked or 1) * (features + hidden),
        "linear": linear,
    }
