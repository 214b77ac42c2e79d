"""The Fisher in compressed coordinates: sums of any estimator and structure, and the metric that they give."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fisher_ray.config import MetricConfig
from fisher_ray.errors import DataError
from fisher_ray.metric.adjacent import Adjacent
from fisher_ray.metric.damping import HELD_OUT, is_held_out, resolve
from fisher_ray.metric.diagonal import Diagonal
from fisher_ray.metric.estimator import Arrays, Estimator
from fisher_ray.metric.exact import Exact
from fisher_ray.metric.frequent_directions import FrequentDirections
from fisher_ray.metric.lowrank import LayerTrace, Part
from fisher_ray.metric.nystrom import Nystrom
from fisher_ray.metric.row_buffer import RowBuffer

ROUNDING = 16
"""Eigenvalues that are not more than so many squares of the scores' own rounding, of the largest, are no directions."""
SIDES = ("fit", "held")
"""What is summed apart: the samples that eigenvectors are fitted on, and those held out to choose the damping."""
WHOLE = "all"


class FisherSum:
    """``Σ_x Σ_c p_c s_c s_cᵀ`` in ``D`` coordinates, as ``metric.estimator`` and ``metric.structure`` have it.

    For ``damping: auto`` one sample in :data:`fisher_ray.metric.damping.HELD_OUT` is summed apart, see
    :func:`fisher_ray.metric.damping.is_held_out`, so that the damping can be chosen on rows that the eigenvectors have
    not seen, whatever the number of units. Where a sketch would be as wide as its matrix, and so the matrix itself in a
    costlier form, the matrix is summed.

    Args:
        settings: of the metric.
        dims: coordinates of each layer, in order.
        seed: of what an estimator draws.
    """

    def __init__(self, settings: MetricConfig, dims: Mapping[str, int], seed: int) -> None:
        """See the class."""
        self._settings, self._dims, self._seed = settings, dict(dims), seed
        self.dim = sum(dims.values())
        sides = SIDES if settings.damping == "auto" else SIDES[:1]
        self._layer_places = _places(dims)
        self._places = self._layer_places if settings.structure == "block" else {WHOLE: slice(0, self.dim)}
        self._sums = {name: {side: self._estimator(name) for side in sides} for name in self._places}
        self._counts, self._means = np.zeros(len(sides)), np.zeros((len(sides), self.dim))
        self._buffers = {side: RowBuffer(self.dim, partial(self._add_rows, side)) for side in sides}
        self._squares, self._norms = np.zeros(self.dim), np.zeros((2, len(dims)))
        self._precision = np.zeros(1)

    def _estimator(self, name: str) -> Estimator:
        settings, place = self._settings, self._places[name]
        dim = place.stop - place.start
        size = min(dim, settings.size or 2 * settings.rank)
        if settings.estimator == "diagonal":
            return Diagonal(dim)
        if settings.estimator == "nystrom" and size < dim:
            return Nystrom(dim, size, zlib.crc32(f"{self._seed} {name}".encode()))
        if settings.estimator == "frequent_directions" and size < dim:
            return FrequentDirections(dim, size)
        return Adjacent(list(self._dims.values())) if settings.structure == "adjacent" else Exact(dim)

    def add(self, compressed: Tensor, index: Tensor) -> None:
        """Add weighted compressed scores ``(B, S, D)`` of the samples ``index`` ``(B,)``."""
        self._precision = np.maximum(self._precision, torch.finfo(compressed.dtype).eps)
        held = is_held_out(index) if len(self._counts) > 1 else torch.zeros(len(index), dtype=torch.bool)
        for place, (side, samples) in enumerate(zip(SIDES, (~held, held), strict=True)):
            if not bool(samples.any()):
                continue
            chosen = compressed[samples.to(compressed.device)]
            self._counts[place] += len(chosen)
            if self._settings.centered:  # a draw's weight is 1/√S, its score's in the mean 1/S
                self._means[place] += _numpy(chosen.double().sum(dim=(0, 1))) / np.sqrt(chosen.shape[1])
            self._buffers[side].add(chosen.flatten(0, 1))

    def _add_rows(self, side: str, rows: Tensor) -> None:
        self._squares += _numpy(rows.square().sum(dim=0))
        for name, where in self._places.items():
            self._sums[name][side].add(rows[:, where])

    def add_norms(self, compressed: Tensor, whole: Mapping[str, float]) -> None:
        """Compare some samples' compressed scores ``(B, S, D)`` with the whole scores' squared norms by layer."""
        for number, (name, place) in enumerate(self._layer_places.items()):
            self._norms[0, number] += float(compressed[:, :, place].double().square().sum())
            self._norms[1, number] += whole.get(name, 0.0)

    def to_arrays(self) -> Arrays:
        """Return what was summed; :meth:`merge` merges it."""
        for buffer in self._buffers.values():
            buffer.flush()
        arrays = {"counts": self._counts, "squares": self._squares, "norms": self._norms}
        if self._settings.centered:
            arrays["means"] = self._means
        arrays = {name: value.copy() for name, value in arrays.items()}
        arrays["precision"] = self._precision
        for number, sides in enumerate(self._sums.values()):
            for side, estimator in sides.items():
                arrays |= {f"{number}:{side}:{key}": value for key, value in estimator.to_arrays().items()}
        return arrays

    def merge(self, left: Arrays, right: Arrays) -> Arrays:
        """Return the arrays of the samples of both."""
        plain = ("counts", "squares", "norms", "means")
        merged = {key: value + right[key] for key, value in left.items() if key in plain}
        merged["precision"] = np.maximum(left["precision"], right["precision"])
        for number, sides in enumerate(self._sums.values()):
            for side, estimator in sides.items():
                pick = partial(_pick, prefix=f"{number}:{side}:")
                found = estimator.merge(pick(left), pick(right))
                merged |= {f"{number}:{side}:{key}": value for key, value in found.items()}
        return merged

    def decompose(self, arrays: Arrays) -> tuple[tuple[Part, ...], tuple[LayerTrace, ...]]:
        """Eigendecompose merged sums; of the parts' eigenvalues, the ``metric.rank`` largest are kept.

        Raises:
            DataError: if the sums have no rows, are not finite or are zero.
        """
        settings, counts = self._settings, arrays["counts"]
        if not counts.sum() > 0:
            raise DataError("the Fisher sum has no rows: all were skipped, or there are none")
        if not counts.all():
            raise DataError(f"metric.damping auto holds out one sample in {HELD_OUT}; give more rows or a number")
        if not np.isfinite(arrays["squares"]).all():
            raise DataError("the Fisher sum holds NaN or infinity: look for extreme inputs or weights")
        parts = [self._part(number, name, arrays) for number, name in enumerate(self._places)]
        eigvals = torch.cat([part.eigvals for part in parts])
        floor = ROUNDING * float(arrays["precision"][0]) ** 2 * float(eigvals.max()) if len(eigvals) else 0.0
        num_kept = min(settings.rank, int((eigvals > floor).sum()))
        chosen = eigvals.argsort(descending=True, stable=True)[:num_kept]
        if not len(chosen):
            raise DataError("the Fisher sum is zero: the metric has no direction. Is the network's output constant?")
        kept, start = [], 0
        for part in parts:
            stop = start + len(part.eigvals)
            count = int(((chosen >= start) & (chosen < stop)).sum())  # leading ones, as they descend
            if count:
                leading, vectors = part.eigvals[:count].clone(), part.eigvecs[:, :count].contiguous()
                kept.append(replace(part, eigvals=leading, eigvecs=vectors))
            start = stop
        return tuple(kept), self._layers(arrays)

    def _part(self, number: int, name: str, arrays: Arrays) -> Part:
        place, estimator, counts = self._places[name], self._estimator(name), arrays["counts"]
        sides = [_pick(arrays, f"{number}:{side}:") for side in self._sums[name]]
        means = arrays["means"][:, place] if self._settings.centered else None
        total = float(counts.sum())
        whole = sides[0] if len(sides) == 1 else estimator.merge(*sides)
        noise = 0.0
        if means is not None:
            noise = max(64, place.stop - place.start) * np.finfo(np.float64).eps * estimator.trace(whole)
            whole = self._centred(name, whole, total, means.sum(axis=0))
            sides = [self._centred(name, *side) for side in zip(sides, counts, means, strict=True)]
        eigvals, eigvecs = estimator.eigendecompose(whole, self._settings.rank)
        above = eigvals > noise  # what a difference of large numbers leaves is none
        eigvals, eigvecs = eigvals[above], eigvecs[:, above]
        mean = estimator.trace(whole) / total / (place.stop - place.start)

        def held_out() -> tuple[Tensor, Tensor]:
            values, vectors = estimator.eigendecompose(sides[0], self._settings.rank)
            return values / counts[0], estimator.quadratic_forms(sides[1], vectors) / counts[1]

        damping = resolve(self._settings.damping, mean, held_out) if len(eigvals) else 0.0
        return Part(name, place.start, place.stop, eigvals / total, eigvecs, damping)

    def _centred(self, name: str, sums: Arrays, count: float, total: np.ndarray) -> Arrays:
        """Subtract ``N μ μᵀ`` from sums that are linear in the matrix."""
        mean = self._estimator(name)
        mean.add(torch.from_numpy(total / np.sqrt(count))[None])
        subtracted = mean.to_arrays()
        return {key: value - subtracted[key] for key, value in sums.items()}

    def _layers(self, arrays: Arrays) -> tuple[LayerTrace, ...]:
        squares, total = arrays["squares"], float(arrays["counts"].sum())
        if self._settings.centered:
            squares = squares - arrays["means"].sum(axis=0) ** 2 / total
        found = []
        for number, (name, place) in enumerate(self._layer_places.items()):
            kept, whole = arrays["norms"][:, number]
            trace = float(squares[place].sum()) / total
            found.append(LayerTrace(name, self._dims[name], trace, float(kept / whole) if whole > 0 else 0.0))
        return tuple(found)


def _places(dims: Mapping[str, int]) -> dict[str, slice]:
    found, start = {}, 0
    for name, dim in dims.items():
        found[name] = slice(start, start + dim)
        start += dim
    return found


def _pick(arrays: Arrays, prefix: str) -> Arrays:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def _numpy(value: Tensor) -> np.ndarray:
    return value.cpu().numpy()
