"""Multinomial logistic regression on the stored features: leaves of rows are shared out over ranks, and rank 0 leads.

Any number of ranks fits the same bits: leaves are cut by the configuration, and their sums are added in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from fisher_ray.config import Config
from fisher_ray.data import plan_units
from fisher_ray.errors import DataError, FisherRayError, WorkersLostError
from fisher_ray.linear import (
    GramSum,
    LinearWeights,
    Minimum,
    Preconditioner,
    best_penalty,
    fit_temperature,
    minimise,
    preconditioner,
    sum_gradients,
)
from fisher_ray.records import Unit
from fisher_ray.stages import exchange, shallow
from fisher_ray.stages.facts import Facts
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import FeatureStore, load_arrays

LEAF_ROWS = 4096
"""Rows of one leaf, rounded up to whole chunks: enough to read ahead within it, few enough to share out evenly."""
TOLERANCE = 1e-3
"""Norm of the gradient, in preconditioned coordinates, at which a fit counts as converged.

The loss is then within about 1e-6 of its minimum, where float32 features stop telling solutions apart.
"""

Part: TypeAlias = Literal["fit", "all", "validation"]
"""Rows, as :func:`~fisher_ray.stages.shallow.linear_rows` names them."""
Raw: TypeAlias = tuple[Tensor, Tensor]
"""A weight ``(C, F)`` and a bias ``(C,)`` in the raw columns' units, float64."""


@dataclass(frozen=True)
class Order:
    """What the leader asks of every rank.

    Attributes:
        task: ``gradient``: sum the leaves' losses and gradients; ``score``: apply the weight to every row; or ``stop``.
        part: the rows that it is asked of.
        weight: float64 ``(K, F)``: ``K`` is ``C``, or for ``score`` ``C`` times the number of models.
        bias: float64 ``(K,)``.
    """

    task: Literal["gradient", "score", "stop"]
    part: Part
    weight: Tensor
    bias: Tensor


class Exchange(exchange.Ranks, Protocol):
    """The ranks of one fit, whose rank 0 gives orders."""

    def share(self, order: Order | None) -> Order:
        """Return on every rank what rank 0 gives; the others give None."""


class Alone(exchange.Alone):
    """The exchange of a fit in one process."""

    def share(self, order: Order | None) -> Order:
        """Return ``order``."""
        if order is None:
            raise TypeError("rank 0 gives orders")
        return order


def leaf_units(config: Config, facts: Facts) -> list[Unit]:
    """Cut the shallow split's rows into leaves of whole chunks, from the configuration alone."""
    chunk = config.store.chunk_rows
    return plan_units(facts.num_rows["shallow"], -(-LEAF_ROWS // chunk) * chunk)


def fit_logistic(bench: Workbench, ranks: Exchange, *, tolerance: float = TOLERANCE) -> dict[str, Any] | None:
    """Choose the penalty on the validation rows, fit all rows with it, and write ``linear/weights.zarr``.

    Every rank calls this. Rank 0 alone holds sums, preconditioner (``F × F`` float64 each, twice while it is made) and
    L-BFGS; the others answer for their leaves until they are told to stop.

    Args:
        bench: the process's, with sealed features and ``linear/sums-fit.zarr`` and ``linear/sums-all.zarr``.
        ranks: of the fit.
        tolerance: as :data:`TOLERANCE`.

    Returns:
        On rank 0, plain values; elsewhere None. ``path``: by penalty in the configuration's order ``accuracy`` on the
        validation rows, ``steps`` and ``converged``; ``penalty``: the best (of equals, the largest); ``validation``:
        its accuracy; ``temperature``: of its scores there; ``num_rows``, ``num_columns``, ``steps`` and ``converged``
        of the last fit, on all rows.

    Raises:
        DataError: if there are no rows, or they are not those of the sums; on rank 0, whichever rank found it.
        StoreError: if features or sums are missing or corrupt; likewise.
        WorkersLostError: if the exchange broke.
    """
    share = _Share(bench, ranks)
    if ranks.rank:
        share.serve()
        return None
    try:
        result = _Leader(share, tolerance).run()
    except WorkersLostError:
        raise  # what is left of the exchange would block
    except BaseException:
        share.stop()
        raise
    share.stop()
    return result


class Leaves:
    """One rank's part of a pass over the rows: every ``size``-th leaf."""

    def __init__(self, bench: Workbench, ranks: exchange.Ranks) -> None:
        """Touch nothing yet."""
        self.bench, self._ranks = bench, ranks
        self._units = leaf_units(bench.config, bench.facts)

    @cached_property
    def _store(self) -> FeatureStore:
        return self.bench.train_store

    def go_through(self, order: Order, take: Callable[[Tensor], object]) -> Exception | None:
        """Do ``order`` together with the other ranks, which call this too; rank 0 takes the leaves' results, in order.

        Returns:
            What the first rank that failed met, on all ranks alike.
        """
        size = self._ranks.size
        for first in range(0, len(self._units), size):
            replies = self._ranks.collect(self._leaf(order, first + self._ranks.rank))
            if isinstance(replies, Exception):
                return replies
            for reply in replies[: len(self._units) - first]:
                take(reply)
        return None

    def _leaf(self, order: Order, position: int) -> Tensor | Exception:
        if position >= len(self._units):
            return torch.zeros(0, dtype=torch.float64)
        unit = self._units[position]
        try:
            return _TASKS[order.task](self.bench, self._store, unit, order)
        except FisherRayError as error:
            return error
        except Exception as error:  # noqa: BLE001 - rank 0 raises it; here it would leave the others waiting
            return RuntimeError(f"rows [{unit.start}, {unit.stop}): {type(error).__name__}: {error}")


class _Share(Leaves):
    """One rank's part of a fit that rank 0 leads."""

    def __init__(self, bench: Workbench, ranks: Exchange) -> None:
        super().__init__(bench, ranks)
        self._exchange = ranks

    def serve(self) -> None:
        """Answer rank 0's orders until it says stop."""
        while (order := self._exchange.share(None)).task != "stop":
            self.go_through(order, lambda _: None)

    def stop(self) -> None:
        """Let the other ranks go."""
        nothing = torch.zeros(0, dtype=torch.float64)
        self._exchange.share(Order("stop", "all", nothing[:, None], nothing))

    def order(self, order: Order, take: Callable[[Tensor], object]) -> None:
        """Have every rank do ``order``, and take the leaves' results in their order; rank 0 alone.

        Raises:
            FisherRayError: a rank's own.
            RuntimeError: naming the rows on which anything else happened.
        """
        failure = self.go_through(self._exchange.share(order), take)
        if failure is not None:
            raise failure


def _sum_gradient(bench: Workbench, store: FeatureStore, unit: Unit, order: Order) -> Tensor:
    """Return rows, loss, gradient in the weight and in the bias, one after the other: float64 ``(2 + C · F + C,)``."""
    read = shallow.linear_rows(bench, store, order.part, range(unit.start, unit.stop))
    blocks = ((x.to(bench.device), labels) for x, labels in map(shallow.fit_rows, read))
    rows, loss, by_weight, by_bias = sum_gradients(blocks, order.weight, order.bias, bench.class_weights)
    return torch.cat([torch.tensor([rows, loss], dtype=torch.float64), by_weight.reshape(-1), by_bias])


def _score(bench: Workbench, store: FeatureStore, unit: Unit, order: Order) -> Tensor:
    """Return each row's label and scores: float64 ``(B, 1 + K)``."""
    model = LinearWeights(order.weight, order.bias, math.nan)
    parts = [torch.zeros(0, 1 + len(order.bias), dtype=torch.float64)]
    for block in shallow.linear_rows(bench, store, order.part, range(unit.start, unit.stop)):
        scores = shallow.mean_scores(model, block["x"].to(bench.device)).double().cpu()
        parts.append(torch.cat([block["labels"].double()[:, None], scores], 1))
    return torch.cat(parts)


_TASKS: dict[str, Callable[[Workbench, FeatureStore, Unit, Order], Tensor]] = {
    "gradient": _sum_gradient,
    "score": _score,
}


@dataclass(frozen=True)
class _Fit:
    """One fit's model, where it ended (raw, float64), and how."""

    model: LinearWeights
    raw: Raw
    found: Minimum

    def facts(self) -> dict[str, Any]:
        return {"steps": self.found.num_steps, "converged": self.found.converged}


class _Leader:
    """What rank 0 does besides its share."""

    def __init__(self, share: _Share, tolerance: float) -> None:
        self._share, self._bench, self._tolerance = share, share.bench, tolerance

    def run(self) -> dict[str, Any]:
        fits = self._fit_path()
        scores, labels = self._validate([fit.model for fit in fits])
        best, accuracies = best_penalty([fit.model.penalty for fit in fits], scores, labels)
        penalty, temperature = fits[best].model.penalty, fit_temperature(scores[best], labels)
        sums = _load_sums(self._bench, "all")
        final = self._fit(sums, penalty, "all", fits[best].raw)
        shallow.save_weights(self._bench, "weights", replace(final.model, temperature=temperature))
        path = [
            {"penalty": fit.model.penalty, "accuracy": accuracies[place], **fit.facts()}
            for place, fit in enumerate(fits)
        ]
        chosen = {"penalty": penalty, "validation": accuracies[best], "temperature": temperature}
        return {
            "path": path,
            **chosen,
            "num_rows": round(sums.num_rows),
            "num_columns": sums.num_columns,
            **final.facts(),
        }

    def _fit_path(self) -> list[_Fit]:
        """Fit the fitting rows with each penalty, the largest first, each from where the one before ended."""
        penalties = self._bench.config.linear.penalties
        sums, fits, raw = _load_sums(self._bench, "fit"), dict[float, _Fit](), None
        for penalty in sorted(penalties, reverse=True):
            fits[penalty] = self._fit(sums, penalty, "fit", raw)
            raw = fits[penalty].raw
        return [fits[penalty] for penalty in penalties]

    def _fit(self, sums: GramSum, penalty: float, part: Part, near: Raw | None) -> _Fit:
        coordinates = preconditioner(sums, penalty)

        def evaluate(params: Tensor) -> tuple[float, Tensor]:
            rows, loss, by_weight, by_bias = self._gradient(part, *coordinates.raw(params))
            check_num_rows(part, rows, coordinates.num_rows)
            return coordinates.objective(params, loss, by_weight, by_bias)

        start = coordinates.start() if near is None else _params(coordinates, near)
        found = minimise(evaluate, start, self._bench.config.linear.max_steps, self._tolerance)
        return _Fit(coordinates.model(found.params), coordinates.raw(found.params), found)

    def _gradient(self, part: Part, weight: Tensor, bias: Tensor) -> tuple[float, float, Tensor, Tensor]:
        """Return rows, loss, and its gradients, summed over all leaves of ``part``."""
        total = torch.zeros(2 + weight.numel() + bias.numel(), dtype=torch.float64)
        self._share.order(Order("gradient", part, weight, bias), total.add_)
        rows, loss = total[:2].tolist()
        return rows, loss, total[2 : 2 + weight.numel()].view_as(weight), total[2 + weight.numel() :]

    def _validate(self, models: list[LinearWeights]) -> tuple[list[Tensor], Tensor]:
        parts: list[Tensor] = []
        self._share.order(score_order(models), parts.append)
        return split_scores(parts, len(models))


def check_num_rows(part: Part, found: float, summed: float) -> None:
    """Refuse sums of other rows than those found.

    Raises:
        DataError: naming both numbers.
    """
    if not math.isclose(found, summed, rel_tol=1e-9):
        raise DataError(
            f"the features' part {part!r} has {found:g} rows, its sums have {summed:g}: they are not of one run. Run "
            "the stage 'linear' again."
        )


def score_order(models: list[LinearWeights]) -> Order:
    """Have the validation rows scored once, with all models' weights as those of one."""
    weight = torch.cat([model.weight for model in models]).double()
    return Order("score", "validation", weight, torch.cat([model.bias for model in models]).double())


def split_scores(parts: list[Tensor], num_models: int) -> tuple[list[Tensor], Tensor]:
    """Return each model's scores ``(N, C)`` and the labels ``(N,)`` of what leaves reply to :func:`score_order`.

    Raises:
        DataError: if there are no rows.
    """
    rows = torch.cat(parts)
    if not len(rows):
        raise DataError("no rows were left to score a model on: give more rows, or raise linear.validation")
    return list(rows[:, 1:].chunk(num_models, 1)), rows[:, 0].long()


def _load_sums(bench: Workbench, part: Part) -> GramSum:
    return GramSum.from_arrays(load_arrays(bench.url(f"linear/sums-{part}.zarr"))[0])


def _params(coordinates: Preconditioner, raw: Raw) -> Tensor:
    """Undo :meth:`Preconditioner.raw`; the weights of constant columns are left out."""
    weight, bias = raw
    varies = coordinates.inverse > 0
    standardised = torch.where(varies, weight / torch.where(varies, coordinates.inverse, 1.0), 0.0)
    moved = standardised @ coordinates.factor / math.sqrt(coordinates.num_classes * coordinates.num_rows)
    centre = (bias + weight @ coordinates.mean) / math.sqrt(coordinates.num_classes)
    return torch.cat([moved, centre[:, None]], 1)
