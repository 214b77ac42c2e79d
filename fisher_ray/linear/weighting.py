"""As how many rows the rows of each class count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fisher_ray.errors import RequestError

ClassWeights: TypeAlias = Literal["none", "balanced"] | Mapping[int, float]


def weigh_classes(asked: ClassWeights, counts: Tensor) -> Tensor | None:
    """Return each class's weight.

    Args:
        asked: ``none``; ``balanced``: ``N / (K N_c)``, ``K`` the classes that have rows, so that these count the same
            and all rows together as before; or weights by class, 1 for those not named.
        counts: rows of each class, ``(C,)``.

    Returns:
        Float64 ``(C,)``, or None if every row counts as one.

    Raises:
        RequestError: if a class or a weight is not one.
    """
    if asked == "none":
        return None
    counts = counts.double()
    if asked == "balanced":
        present = counts > 0
        return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)
    weights = torch.ones_like(counts)
    for label, weight in dict(asked).items():
        if not 0 <= label < len(counts) or not 0 < weight < float("inf"):
            raise RequestError(
                f"class_weights gives class {label} the weight {weight}. Classes are 0 to {len(counts) - 1}, weights "
                "positive numbers: correct it."
            )
        weights[label] = weight
    return weights
