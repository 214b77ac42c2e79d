"""Scores ``s_c(x) = ∇_θ log p_θ(c|x)`` as factors, and formed in full where they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisher_ray.errors import DataError
from fisher_ray.gradients.capture import Trace, find_blocks, trace
from fisher_ray.gradients.layers import Block


@dataclass(frozen=True)
class Factors:
    """Both factors of one call of one block.

    Attributes:
        block: the block.
        value: the layer's input, as the layer got it, ``(B, ...)``.
        deltas: ``δ``, shape ``(S, B, O, T)``; ``S`` is ``C`` for all classes, else 1.
    """

    block: Block
    value: Tensor
    deltas: Tensor

    def inputs(self) -> Tensor:
        """Return ``a``, shape ``(B, A, T)``."""
        return self.block.inputs(self.value)

    def gradient(self) -> Tensor:
        """Return ``Σ_t δ_t a_tᵀ``, shape ``(B, S, O, A)``."""
        num_scores, batch, num_outputs, num_positions = self.deltas.shape
        deltas = self.deltas.transpose(0, 1).reshape(batch, num_scores * num_outputs, num_positions)
        return torch.bmm(deltas, self.inputs().transpose(1, 2)).reshape(batch, num_scores, num_outputs, -1)


@dataclass(frozen=True)
class Scores:
    """Scores of one batch, as factors.

    Attributes:
        logits: ``(B, C)``, detached.
        hidden: the last layer's input ``(B, H)``, or None.
        factors: one entry a block and call.
    """

    logits: Tensor
    hidden: Tensor | None
    factors: list[Factors]


class ScoreEngine:
    """Computes factors of scores for one network.

    Args:
        model: the network, whose rows must not depend on each other.
        parameters: glob over parameter names.

    Raises:
        ModelError: see :func:`fisher_ray.gradients.capture.find_blocks`.
    """

    def __init__(self, model: nn.Module, parameters: str = "*") -> None:
        """See the class."""
        self.model = model
        self.blocks = find_blocks(model, parameters)
        self._layers = list(dict.fromkeys(block.layer for block in self.blocks))

    @property
    def block_shapes(self) -> dict[str, tuple[int, int]]:
        """``(O, A)`` of every block."""
        return {block.name: (block.num_outputs, block.num_inputs) for block in self.blocks}

    def all_classes(self, inputs: Tensor, *, weighted: bool = True) -> Scores:
        """Scores of all ``C`` classes by one batched backward, weighted by ``√p_c`` if ``weighted``; ``S = C``."""
        run = trace(self.model, inputs, self._layers)
        probabilities = run.logits.detach().softmax(dim=1)
        one_hot = torch.eye(run.logits.shape[1], dtype=run.logits.dtype, device=run.logits.device)
        cotangents = one_hot - probabilities[:, None]  # (B, C, C)
        if weighted:
            cotangents = cotangents * probabilities.sqrt()[:, :, None]
        return self._backward(run, cotangents.transpose(0, 1).contiguous())

    def of_labels(self, inputs: Tensor, labels: Tensor | Callable[[Tensor], Tensor]) -> Scores:
        """Scores of one label a sample; ``S = 1``.

        Args:
            inputs: ``(B, ...)``.
            labels: int64 ``(B,)``, or a function that draws them from the probabilities ``(B, C)``.

        Raises:
            DataError: if a label is not in ``[0, C)``.
        """
        run = trace(self.model, inputs, self._layers)
        num_classes = run.logits.shape[1]
        probabilities = run.logits.detach().softmax(dim=1)
        if not isinstance(labels, Tensor):
            labels = labels(probabilities)
        wrong = (labels < 0) | (labels >= num_classes)
        if labels.shape != (len(inputs),) or bool(wrong.any()):
            given = f"label {int(labels[wrong][0])}" if labels.shape == (len(inputs),) else f"shape {labels.shape}"
            raise DataError(f"targets: {given}; the rule is one integer in [0, {num_classes}) for each sample")
        target = nn.functional.one_hot(labels, num_classes).to(probabilities)
        return self._backward(run, (target - probabilities)[None])

    def _backward(self, run: Trace, cotangents: Tensor) -> Scores:
        calls = [(name, a, y) for name, kept in run.calls.items() for a, y in kept]
        outputs = [y for _, _, y in calls]
        batched = len(cotangents) > 1
        deltas = torch.autograd.grad(
            run.logits, outputs, cotangents if batched else cotangents[0], is_grads_batched=batched, allow_unused=True
        )
        factors = []
        by_layer: dict[str, list[Block]] = {}
        for block in self.blocks:
            by_layer.setdefault(block.layer, []).append(block)
        for (name, value, _), delta in zip(calls, deltas, strict=True):
            if delta is None:  # the logits do not depend on this call
                continue
            delta = delta if batched else delta[None]
            factors += [Factors(block, value, block.deltas(delta)) for block in by_layer[name]]
        return Scores(run.logits.detach(), run.hidden, factors)


def _formed(engine: ScoreEngine, scores: Scores) -> dict[str, Tensor]:
    """Form parameters' gradients ``(B, S, *shape)`` from factors, groups joined and calls added."""
    batch, num_scores = len(scores.logits), scores.factors[0].deltas.shape[0]
    out: dict[str, Tensor] = {}
    parameters = dict(engine.model.named_parameters())
    for block in engine.blocks:
        for key in ("weight", "bias"):
            if getattr(block, key):
                name = f"{block.layer}.{key}" if block.layer else key
                out[name] = scores.logits.new_zeros(batch, num_scores, *parameters[name].shape)
    for item in scores.factors:
        rows = slice(item.block.group * item.block.num_outputs, (item.block.group + 1) * item.block.num_outputs)
        for key, part in item.block.split(item.gradient()).items():
            name = f"{item.block.layer}.{key}" if item.block.layer else key
            out[name][:, :, rows] += part
    return out


def per_sample_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Gradients of each sample's cross-entropy, ``∇_θ −log p_θ(y|x)``.

    Args:
        model: network with Linear and Conv2d parameters, logits ``(B, C)``.
        inputs: ``(B, ...)``.
        targets: int64 ``(B,)`` in ``[0, C)``.

    Returns:
        For every parameter its gradients, ``(B, *shape)``; a row does not depend on the others.

    Raises:
        ModelError: if the network has an unsupported layer or train-mode BatchNorm or dropout.
        DataError: if a target is out of range.
    """
    engine = ScoreEngine(model)
    formed = _formed(engine, engine.of_labels(inputs, targets))
    return {name: -value[:, 0] for name, value in formed.items()}


def class_scores(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Scores ``s_c = ∇_θ log p_θ(c|x)`` of all classes, without the ``√p_c``.

    Args:
        model: network with Linear and Conv2d parameters, logits ``(B, C)``.
        inputs: ``(B, ...)``.

    Returns:
        For every parameter ``(B, C, *shape)``.

    Raises:
        ModelError: if the network has an unsupported layer or train-mode BatchNorm or dropout.
    """
    engine = ScoreEngine(model)
    return _formed(engine, engine.all_classes(inputs, weighted=False))
