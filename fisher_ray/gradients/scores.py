"""Scores ``s_y(x) = ∇_θ log p_θ(y|x)`` as factors, and formed in full where they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fisher_ray.errors import ModelError
from fisher_ray.gradients.capture import Axis, Call, Sharing, Sites, Trace, for_each, frozen, trace
from fisher_ray.gradients.discovery import discover
from fisher_ray.gradients.factors import Factors
from fisher_ray.gradients.forming import Scores, form_gradients
from fisher_ray.gradients.general import formed_factors
from fisher_ray.gradients.graphs import Graphs
from fisher_ray.gradients.likelihood import Likelihood, Softmax
from fisher_ray.gradients.memory import is_out_of_memory
from fisher_ray.gradients.network import choose_parameters, refuse_train_mode
from fisher_ray.gradients.outputs import Inputs, outside_inference, pull_back, rows, signature, tensors
from fisher_ray.gradients.precision import Precision, multiplied
from fisher_ray.gradients.spanning import Reflection
from fisher_ray.gradients.verification import verify, verify_halves

FIRST = Axis(0, 1)
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
MAX_TRIES = 4
"""Batches on which gradients that were zero so far are compared."""


class ScoreEngine:
    """Computes factors of scores for one network.

    On the first batch of every shape the network is looked at (:mod:`fisher_ray.gradients.discovery`), and what the
    factors add up to is compared with a plain backward pass (:mod:`fisher_ray.gradients.verification`).

    Args:
        model: the network, whose rows must not depend on each other, with the dtypes that it has now.
        parameters: glob over parameter names, or the names. By a glob, frozen parameters are left out, unless all are.
        likelihood: what the output says of a target; by default, logits of classes.
        precision: ``torch.bfloat16`` or ``torch.float16`` to run the network's forward and backward under autocast;
            None for its own dtypes, whatever autocast there is outside. Weights stay as they are, and factors, logits,
            cotangents and all that is made of them are float32 (float64, if the network has parameters of it).
        graph_batch: on a GPU, the size of the batches whose work is recorded and replayed by :attr:`graphs`.

    Attributes:
        model: the network.
        likelihood: as given.
        blocks: in the network's order.
        parameters: the names of the parameters whose gradients are taken.
        precision: the network's.
        graphs: runs what is made of this engine's scores.

    Raises:
        ModelError: see :func:`fisher_ray.gradients.network.choose_parameters`; or if a half precision is asked for of
            a float64 network.
        RequestError: if ``precision`` is another dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: str | Collection[str] = "*",
        likelihood: Likelihood | None = None,
        precision: torch.dtype | None = None,
        graph_batch: int | None = None,
    ) -> None:
        """See the class."""
        self.model, self.likelihood = model, likelihood or Softmax()
        self._chosen, self._asked = choose_parameters(model, parameters), parameters
        self.blocks, self.parameters = self._chosen.blocks, self._chosen.names
        self.precision = Precision.of(model, precision)
        self._ways: dict[tuple[Any, ...], _Way] = {}
        self.graphs = Graphs(graph_batch)

    @property
    def block_shapes(self) -> dict[str, tuple[int, int]]:
        """``(O, A)`` of every block."""
        return {block.name: block.shape for block in self.blocks}

    @property
    def selection(self) -> str | list[str]:
        """What chooses the same parameters in another copy of the network, whatever is frozen there."""
        matching = [name for name, _ in self.model.named_parameters() if fnmatchcase(name, str(self._asked))]
        return str(self._asked) if matching == self.parameters else self.parameters

    @property
    def like(self) -> Tensor:
        """A number with the factors' dtype on the network's device, for what is made to compute with them."""
        device = next(self.model.parameters()).device
        return torch.zeros((), dtype=self.precision.factors, device=device)

    def output(self, inputs: Inputs) -> Tensor:
        """Return the network's output ``(B, ...)`` in the factors' dtype, without a graph.

        Raises:
            ModelError: if no likelihood can be of it.
        """
        with torch.no_grad():
            return self.precision.widened(self.precision.output(self.model, inputs))

    def all_classes(self, inputs: Inputs, *, weighted: bool = True) -> Scores:
        """Scores of all targets by one batched backward: of all ``C`` classes, weighted by ``√p_c`` if ``weighted``.

        Raises:
            ModelError: if the network's gradients cannot be had; a layer is named.
            RequestError: if the likelihood has too many targets.
        """
        return self._scores(inputs, lambda output: self.likelihood.all_scores(output, weighted=weighted))

    def spanning_classes(self, inputs: Inputs) -> tuple[Scores, Reflection | None]:
        """Combinations of the weighted scores of all targets, fewer where these depend on each other.

        Of classes there are ``C − 1``. Their outer products sum to the sample's exact Fisher, as the scores' do.

        Returns:
            The combinations; and what makes all scores of them after a linear map, or None where they are the scores.

        Raises:
            ModelError, RequestError: as :meth:`all_classes`.
        """
        reflection: Reflection | None = None

        def start(output: Tensor) -> Tensor:
            nonlocal reflection
            cotangents, reflection = self.likelihood.spanning_scores(output)
            return cotangents

        return self._scores(inputs, start), reflection

    def of_labels(self, inputs: Inputs, labels: Tensor) -> Scores:
        """Scores of one target a sample; ``S = 1``.

        Args:
            inputs: ``(B, ...)``.
            labels: the targets, for classes int64 ``(B,)``.

        Raises:
            ModelError: if the network's gradients cannot be had; a layer is named.
            DataError: if a target does not fit.
        """
        scores = self.of_draws(inputs, lambda output, number: labels, 1)
        self.likelihood.check_targets(scores.logits, labels)
        return scores

    def of_draws(self, inputs: Inputs, draw: Callable[[Tensor, int], Tensor], num_draws: int) -> Scores:
        """Scores of ``num_draws`` targets a sample by one batched backward, each divided by ``√num_draws``.

        Their outer products sum to a Monte Carlo estimate of the sample's Fisher.

        Args:
            inputs: ``(B, ...)``.
            draw: from the output and the draw's number, ``0 … num_draws − 1``, to targets that are the output's.
            num_draws: ``S``.

        Raises:
            ModelError: as :meth:`all_classes`.
        """

        def start(output: Tensor) -> Tensor:
            found = [self.likelihood.score(output, draw(output, number)) for number in range(num_draws)]
            return torch.stack(found) / math.sqrt(num_draws)

        return self._scores(inputs, start)

    def _scores(self, inputs: Inputs, start: Callable[[Tensor], Tensor]) -> Scores:
        refuse_train_mode(self.model)
        with torch.inference_mode(False), self.precision.outside(self.model):
            inputs = outside_inference(inputs)
            return self._compute(self._whole_way(inputs).sites, inputs, start)

    def _whole_way(self, inputs: Inputs) -> _Way:
        """Return the way of :meth:`_way`, on which a batch of more than two was compared with its halves, too."""
        way, batch = self._way(inputs), tensors(inputs)[0].shape[0]
        if not way.halved and not isinstance(batch, torch.SymInt) and batch > 2:
            with self.precision.full(self.model):
                verify_halves(self.model, inputs, self.precision)
            way.halved = True
        return way

    def _way(self, inputs: Inputs) -> _Way:
        """Return the way that inputs of these shapes take through the network, looked at and verified."""
        batch, key = tensors(inputs)[0].shape[0], signature(inputs)
        way = self._ways.get(key)
        if way is not None and not way.open(min(batch, 2), self.parameters):
            return way
        sample = rows(inputs, torch.arange(min(batch, 2), device="cpu"))
        sharings = SHARINGS if way is None else SHARINGS[SHARINGS.index(way.sharing) :]
        for sharing in sharings:
            try:
                if way is None or way.sharing != sharing:
                    way = _Way(sharing, discover(self.model, inputs, self._chosen, sharing, self.precision))
                way.add(min(batch, 2), self._verify(way.sites, sample))
            except ModelError:
                if sharing == SHARINGS[-1] or (way is not None and way.sharing == sharing and not way.sites.any_shared):
                    raise
                continue
            self._ways[key] = way
            return way
        raise AssertionError("the last way returns or raises")

    def _verify(self, sites: Sites, sample: Inputs) -> set[str]:
        """Compare with a plain backward, in as many digits as the network can be run in.

        With fewer, the derivatives of some activations near their kinks differ from one batch to the next, and in a
        deep network everything behind them.
        """
        for precision in dict.fromkeys((Precision.of(self.model), self.precision)):
            compute = partial(self._compute, sites, precision=precision)
            try:
                with precision.full(self.model):
                    return verify(self.model, sample, self.blocks, compute, precision)
            except (RuntimeError, ModelError) as error:  # there may be parts for half precision only, or always in it
                if precision == self.precision or is_out_of_memory(error):
                    raise
        raise AssertionError("the last precision returns or raises")

    def _compute(
        self, sites: Sites, inputs: Inputs, start: Callable[[Tensor], Tensor], precision: Precision | None = None
    ) -> Scores:
        batch, precision = tensors(inputs)[0].shape[0], precision or self.precision
        with trace(self.model, inputs, sites, batch, precision) as run:
            if run.output.shape[0] != batch:
                raise ModelError(f"the network's output is {tuple(run.output.shape)} for {batch} samples")
            self.likelihood.check(run.output)
            cotangents, scales = precision.rescaled(start(run.output.detach()))
            deltas = _backward(run, cotangents)
        with frozen(self.model):  # a module may use parameters that are not inside it
            factors: list[Factors] = []
            while run.calls:  # what was in half precision goes as its factors come
                factors += _factors(run.calls.pop(0), deltas.pop(0), batch, precision, scales)
        return Scores(run.output.detach(), run.hidden, len(cotangents), factors)


class _Way:
    """How inputs of some shapes go through the network.

    Attributes:
        sharing: how what the samples share is repeated.
        sites: what is kept.
        halved: whether a batch was compared with its halves.
    """

    def __init__(self, sharing: Sharing, sites: Sites) -> None:
        self.sharing, self.sites, self.halved = sharing, sites, False
        self._num_samples = self._tries = 0
        self._compared: set[str] = set()

    def open(self, num_samples: int, parameters: list[str]) -> bool:
        """Whether a comparison of so many samples would say something new."""
        more = self._tries < MAX_TRIES and not self._compared.issuperset(parameters)
        return more or num_samples > self._num_samples  # with one alone, nothing can be mixed up with another

    def add(self, num_samples: int, compared: set[str]) -> None:
        """Note a comparison that went well, and the parameters whose gradients were not zero in it."""
        self._num_samples, self._tries = max(num_samples, self._num_samples), self._tries + 1
        self._compared |= compared


def _backward(run: Trace, cotangents: Tensor) -> list[list[Tensor | None]]:
    """Return the gradients ``(S, ...)`` at every call's outputs."""
    outputs = [value for item in run.calls for value in item.outputs if value is not None]
    if not outputs or not run.output.requires_grad:
        return [[None] * len(item.outputs) for item in run.calls]
    batched = len(cotangents) > 1
    found = pull_back(run.output, outputs, cotangents if batched else cotangents[0], batched=batched)
    left: Iterator[Tensor | None] = iter(found)
    deltas = [[next(left) if value is not None else None for value in item.outputs] for item in run.calls]
    return [[d if d is None or batched else d[None] for d in parts] for parts in deltas]


def _factors(
    call: Call, deltas: list[Tensor | None], batch: int, precision: Precision, scales: Tensor | None
) -> list[Factors]:
    if all(delta is None for delta in deltas):  # the output does not depend on this call
        return []
    if call.site.layer is None:
        return list(formed_factors(call, deltas, precision, scales))
    (delta,), (axis,) = deltas, call.layout.outputs
    if delta is None or axis is None:
        raise ModelError(f"layer {call.site.name!r} returns no tensor with a row for each sample")
    place = next(place for place, value in enumerate(call.arguments) if isinstance(value, Tensor))
    value, given = call.arguments[place], call.layout.arguments[place]
    if call.layout.shared is not None:
        value, given = for_each(value, batch, call.layout.shared), FIRST
    if given is None:
        raise ModelError(f"layer {call.site.name!r} has an input without a row for each sample, and an output with one")
    value, delta = (precision.widened(part) for part in (given.outermost(value), axis.outermost(delta, 1)))
    if value.shape[0] != batch or delta.shape[1] != batch:
        raise ModelError(f"layer {call.site.name!r} has {value.shape[0]} rows for {batch} samples")
    value, delta = value.flatten(0, 1), multiplied(delta, scales)
    return [call.site.layer.factors(part, value, delta) for part in call.site.parts]


def per_sample_gradients(model: nn.Module, inputs: Inputs, targets: Tensor) -> dict[str, Tensor]:
    """Gradients of each sample's cross-entropy, ``∇_θ −log p_θ(y|x)``.

    Args:
        model: network in eval mode, logits ``(B, C)``.
        inputs: ``(B, ...)``, or several tensors in a tuple or by name.
        targets: int64 ``(B,)`` in ``[0, C)``.

    Returns:
        For every parameter that is not frozen its gradients, ``(B, *shape)``; a row does not depend on the others.

    Raises:
        ModelError: if the network has train-mode batch normalisation or dropout, or a layer that cannot be vectorised.
        DataError: if a target is out of range.
    """
    engine = ScoreEngine(model)
    made = form_gradients(engine.blocks, model, engine.of_labels(inputs, targets))
    return {name: -value[:, 0] for name, value in made.items()}


def class_scores(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Scores ``s_c = ∇_θ log p_θ(c|x)`` of all classes, without the ``√p_c``.

    Args:
        model: network in eval mode, logits ``(B, C)``.
        inputs: ``(B, ...)``, or several tensors in a tuple or by name.

    Returns:
        For every parameter that is not frozen ``(B, C, *shape)``.

    Raises:
        ModelError: if the network has train-mode batch normalisation or dropout, or a layer that cannot be vectorised.
    """
    engine = ScoreEngine(model)
    return form_gradients(engine.blocks, model, engine.all_classes(inputs, weighted=False))
