"""Many classes in few buckets: a count-sketch of their scores, that is made before anything is backpropagated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_ray.errors import RequestError
from fisher_ray.gradients.labels import keyed_uniform
from fisher_ray.gradients.likelihood import Likelihood, Softmax
from fisher_ray.gradients.spanning import Reflection

_ORDER_KEY, _SIGN_KEY = 0xB0C4E7, 0x51674


class ClassBuckets(Softmax):
    """Classification whose classes, where there are more than ``num_buckets``, share so many scores.

    Each class belongs to one bucket and has a sign, both drawn once from ``seed``; buckets have as many classes as
    others, or one more. A bucket's score is ``Σ_c ± √p_c s_c`` over its classes, so a batch costs what ``num_buckets``
    classes cost, and is never ``(C, B, C)``. Over seeds, products of two samples' scores added up over buckets have
    those over classes as their mean: a count-sketch (Charikar, Chen & Farach-Colton, 2002; of features, Weinberger et
    al., 2009). What one seed misses of it are products of different classes of one bucket, ``√p_c √p'_d s_c · s'_d``,
    which are small where few classes are likely.

    Args:
        num_buckets: ``S``.
        seed: of buckets and signs.
    """

    def __init__(self, num_buckets: int, seed: int) -> None:
        """See the class."""
        self._num_buckets, self._seed = num_buckets, seed
        self._signs: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def all_scores(self, output: Tensor, *, weighted: bool) -> Tensor:
        """Return ``g`` of the buckets, ``(S, B, C)``; of all classes where there are no more, or without weights."""
        if not weighted or output.shape[1] <= self._num_buckets:
            return super().all_scores(output, weighted=weighted)
        signs = self._matrix(output)
        probabilities = output.softmax(dim=1)
        roots = probabilities.sqrt()
        return signs[:, None] * roots - (signs @ roots.T)[..., None] * probabilities

    def spanning_scores(self, output: Tensor) -> tuple[Tensor, Reflection | None]:
        """See :class:`~fisher_ray.gradients.likelihood.Likelihood`: no bucket's follows from the others'."""
        if output.shape[1] <= self._num_buckets:
            return super().spanning_scores(output)
        return self.all_scores(output, weighted=True), None

    def _matrix(self, output: Tensor) -> Tensor:
        """Return the signs of classes in their buckets, zeros elsewhere, ``(S, C)``."""
        key = output.shape[1], output.dtype, output.device
        if key not in self._signs:
            self._signs[key] = bucket_signs(key[0], self._num_buckets, self._seed).to(output)
        return self._signs[key]


def bucketed(likelihood: Likelihood, buckets: Sequence[int] | None) -> Likelihood:
    """Return a likelihood whose classes share buckets, or itself.

    Args:
        likelihood: of classes, where there are buckets.
        buckets: their number and the seed, or None.

    Raises:
        RequestError: if the likelihood is not one of classes.
    """
    if buckets is None:
        return likelihood
    if type(likelihood) is not Softmax:
        raise RequestError(
            f"class_buckets are of classes, not of a {type(likelihood).__name__} likelihood. Leave them out."
        )
    num_buckets, seed = buckets
    return ClassBuckets(num_buckets, seed)


def bucket_signs(num_classes: int, num_buckets: int, seed: int) -> Tensor:
    """Return which bucket each class is in, as its sign there and zeros elsewhere, float64 ``(S, C)``."""
    classes = torch.arange(num_classes)
    order = keyed_uniform(seed ^ _ORDER_KEY, classes).argsort(stable=True)
    found = torch.zeros(num_buckets, num_classes, dtype=torch.float64)
    found[classes % num_buckets, order] = 1.0
    return found * torch.where(keyed_uniform(seed ^ _SIGN_KEY, classes) < 0.5, -1.0, 1.0)
