"""The linear model's ridge regression once more, with the factor that leaving out a row needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.linear import RidgeSystem
from fisher_ray.stages.shallow import merge_sums, ridge_columns
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import load_arrays, save_arrays

RIDGE = "ridge.zarr"
"""The system, in the folder of what asks for it."""


def save_ridge(
    bench: Workbench,
    fit: dict[str, np.ndarray],
    validation: dict[str, np.ndarray],
    *,
    folder: str,
    penalty: float,
    rank: int | None,
    damping: float | None,
    temperature: float,
) -> dict[str, Any]:
    """Fit on all rows as the run did, and write the system; ``fit`` may be added to."""
    system = RidgeSystem.fit(merge_sums(fit, validation), penalty, ridge_columns(bench, rank, damping))
    chosen = {"penalty": penalty, "rank": rank, "damping": damping, "temperature": temperature}
    save_arrays(bench.url(f"{folder}/{RIDGE}"), system.to_arrays(), {"kind": "ridge", **chosen})
    return {"num_columns": len(system.index)}


def load_ridge(url: str) -> RidgeSystem:
    """Read what :func:`save_ridge` wrote."""
    return RidgeSystem.from_arrays(load_arrays(url)[0])


def row_weights(bench: Workbench, labels: Tensor) -> Tensor | None:
    """Return as how many rows each training row of ``labels`` counts, float64 ``(B,)``; None if all as one."""
    weights = bench.class_weights
    return None if weights is None else weights[labels.long()].double()


class RidgeInfluence:
    """What each training row changes in the squared error ``½ ‖f(x) − y‖²`` of some queries: exact.

    Without row i, of pull ``u`` (:meth:`RidgeSystem.pulls`), the prediction at x is ``f − h u`` and the error larger by
    ``−h e·u + ½ h² ‖u‖²``, with ``e = f(x) − y`` and ``h = 1/n + zᵀ A⁻¹ z_i``. Positive rows help.

    Args:
        system: of the run.
        z: standardised queries, float64 ``(Q, F')``.
        classes: that ``y`` stands for, int64 ``(Q,)``.
    """

    def __init__(self, system: RidgeSystem, z: Tensor, classes: Tensor) -> None:
        """See the class."""
        self._system, self._solved = system, system.solved(z).float()
        onehot = torch.nn.functional.one_hot(classes.long(), len(system.intercept)).double()
        self._errors = (system.scores(z) - onehot).float()

    def scores(self, x: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the scores ``(Q, B)``, float32, of training rows ``x`` ``(B, F)``."""
        z = self._system.standardised(x)
        pulls, _ = self._system.pulls(z, labels, weights)
        pulls = pulls.float()
        share = self._solved @ z.float().mT + 1 / self._system.num_rows
        return share * (0.5 * share * pulls.square().sum(1) - self._errors @ pulls.mT)
