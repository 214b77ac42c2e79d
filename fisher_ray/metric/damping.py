"""How much the metric is damped: as asked for, or so that held-out rows come out whitened."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisher_ray.config import AbsoluteDamping

HELD_OUT = 5
"""One sample in so many is held out to choose the damping."""
_GOLDEN, _CIRCLE = 2654435769, 2**32

Damping = str | float | AbsoluteDamping


def resolve(damping: Damping, mean: float, held_out: Callable[[], tuple[Tensor, Tensor]]) -> float:
    """Return the damping ``δ`` in the eigenvalues' unit.

    Args:
        damping: relative to ``mean``; absolute; or ``auto``, see :func:`held_out_damping`.
        mean: the mean eigenvalue.
        held_out: for ``auto``, eigenvalues fitted on the other rows and held-out variances, each ``(R,)``. Where there
            is none, of what the held-out rows alone reach, the damping is ``mean``.
    """
    if damping == "auto":
        eigvals, variances = held_out()
        return held_out_damping(eigvals, variances, mean) if len(eigvals) else mean
    if isinstance(damping, AbsoluteDamping):
        return damping.absolute
    return float(damping) * mean


def held_out_damping(eigvals: Tensor, variances: Tensor, mean: float) -> float:
    """Choose the damping ``δ`` under which held-out second moments are closest to the identity.

    Minimises the log-det divergence (Stein's loss; James & Stein, 1961) of the whitened held-out Fisher ``M`` from the
    identity, ``tr M − log det M``, which in the eigenbasis is ``Σ_i v_i / (λ_i + δ) + log(λ_i + δ)`` up to a constant.

    Args:
        eigvals: ``λ``, fitted on the other rows, ``(R,)``.
        variances: ``v``, the held-out Fisher's diagonal in the same eigenvectors, ``(R,)``.
        mean: the mean eigenvalue; ``δ`` is searched on 241 points of ``[1e-6, 1e2]`` times it.
    """
    grid = mean * torch.logspace(-6, 2, 241, dtype=torch.float64)
    damped = eigvals[None] + grid[:, None]
    loss = (variances / damped + damped.log()).sum(1)
    return float(grid[int(loss.argmin())])


def is_held_out(index: Tensor) -> Tensor:
    """Return whether each sample is held out: ``(B,)`` sample indices, non-negative, to booleans ``(B,)``.

    Steps of the golden ratio around a circle, of which an arc is held out: close to its share in every run of
    samples, and in every arithmetic progression of them, so data ordered with a period (a class after the other, a
    view after the other) is not held out by class or view.
    """
    return index.long() % 2**31 * _GOLDEN % _CIRCLE < _CIRCLE // HELD_OUT
