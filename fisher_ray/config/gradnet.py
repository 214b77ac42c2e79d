"""The section of GradNet: which entries of which gradients it takes, its shape, and how it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fisher_ray.config.section import Section
from fisher_ray.config.sections import Fraction, PositiveFloat, PositiveInt


class GradNetConfig(Section):
    """The block network on sparse normalised gradients of Daróczy et al. (2018), whose values are the defaults."""

    parameters: str = "*weight"
    """Glob over the names of the parameters whose gradients are taken; a layer's are a block."""
    share: Fraction = 0.15
    """Of each layer's entries, those with the largest absolute values that are kept; the others are zero."""
    normalise: bool = True
    """Whether every coordinate's kept entries are moved and scaled to ``[0, 1]``."""
    power: PositiveFloat | None = 0.5
    """Of the absolute values, the signs kept; ``null`` leaves them."""
    range_fraction: Fraction = 1.0
    """Of the shallow split's units, those whose entries the ranges are of."""
    draws: PositiveInt = 1
    """Labels drawn for each training sample, each with a gradient of its own; with ``linear.views: 2`` as many again
    for the mirror image. A pass over the samples takes one of them each, the next pass another."""
    structure: Literal["block", "adjacent"] = "block"
    """``adjacent``: a block is two neighbouring layers, so that blocks overlap."""
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Units of each block. If left out, one for every 1,000 coordinates, in fives, from 5 to 100: for the paper's
    network 5, 100 and 25."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; biases begin at zero."""
    steps: PositiveInt = 5000
    """Batches that it is trained on."""
    batch_size: PositiveInt = 25
    """Samples of a batch."""
    lr: PositiveFloat = 0.01
    """Learning rate, constant."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of SGD."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.04
    """Share of the shallow split's rows that are not trained on: the weights that do best on them are kept. 0 keeps the
    last ones."""
    evaluate_steps: PositiveInt = 500
    """Steps between two looks at the validation rows."""
    checkpoint_steps: PositiveInt = 500
    """Steps after which the training's state is kept in the run folder."""
    buffer_rows: PositiveInt = 1024
    """Rows that are read, and mixed with each other, at a time."""


TRAINING_KEYS = (
    *("structure", "widths", "init_std", "steps", "batch_size", "lr", "momentum", "weight_decay"),
    *("validation", "evaluate_steps", "checkpoint_steps", "buffer_rows"),
)
"""Keys that the training alone reads; the others say what the entries are."""
