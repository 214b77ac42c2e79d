"""A comparison of factors with a plain backward pass, once for every network: no use of a parameter may be missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fisher_ray.errors import ModelError
from fisher_ray.gradients.blocks import Block
from fisher_ray.gradients.forming import Scores, form_gradients
from fisher_ray.gradients.outputs import Inputs, pull_back, rows, tensors
from fisher_ray.gradients.precision import Precision

Start = Callable[[Tensor], Tensor]
Compute = Callable[[Inputs, Start], Scores]

NUM_SCORES = 2
"""Cotangents of each sample: enough that a backward of several at once, and what it does wrong, is seen."""


def verify(
    model: nn.Module, inputs: Inputs, blocks: Sequence[Block], compute: Compute, precision: Precision
) -> set[str]:
    """Compare the sum of the samples' gradients with a plain backward, and each sample's with its own by itself.

    Args:
        model: the network.
        inputs: of one or two samples.
        blocks: of the parameters whose gradients are taken.
        compute: makes scores from inputs and a function from the output to the cotangents ``(S, B, ...)``.
        precision: of both; it says how far apart they may be.

    Returns:
        The parameters whose gradients are finite and not zero, so that comparing them says something.

    Raises:
        ModelError: naming the parameter whose gradients differ.
    """
    every = torch.arange(len(tensors(inputs)[0]), device="cpu")
    cotangents, plain = _plain(
        model, inputs, {piece.parameter for block in blocks for piece in block.pieces}, precision
    )

    def gradients(part: Tensor, num_scores: int) -> dict[str, Tensor]:
        scores = compute(rows(inputs, part), lambda output: cotangents[:num_scores, part])
        return form_gradients(blocks, model, scores)

    together = gradients(every, NUM_SCORES)  # by a batched backward; each row below by a plain one
    if name := _different({name: value.sum(0) for name, value in together.items()}, plain, precision):
        raise ModelError(
            f"the gradients of parameter {name!r} do not add up to those of a plain backward pass: the network's "
            "output depends on chance, or it uses the parameter in a way that is not supported (leave it out with "
            "scores.parameters)"
        )
    for row in range(len(every) if len(every) > 1 else 0):
        alone = gradients(every[row : row + 1], 1)
        mine = {name: value[row, 0] for name, value in together.items()}
        if name := _different(mine, {name: value[0, 0] for name, value in alone.items()}, precision):
            raise ModelError(
                f"the gradient of parameter {name!r} for a sample depends on the other samples of its batch: look for "
                "batch statistics in the network, or for samples that are not on the first axis of its output"
            )
    return {name for name, value in plain.items() if 0 < float(value.norm()) < float("inf")}


def verify_halves(model: nn.Module, inputs: Inputs, precision: Precision) -> None:
    """Compare the output of a batch with those of its halves: of two rows alone, capacities or groups may not show.

    Raises:
        ModelError: if they differ by more than rounding.
    """
    batch = len(tensors(inputs)[0])
    every = torch.arange(batch, device="cpu")
    with torch.no_grad():
        whole, *halves = (
            precision.widened(precision.output(model, rows(inputs, part)))
            for part in (every, every[: batch // 2], every[batch // 2 :])
        )
    one, other = {"output": whole}, {"output": torch.cat(halves)}
    if whole.shape == other["output"].shape and not _different(one, other, precision):
        return
    raise ModelError(
        "a sample's output depends on the other samples of its batch: a batch and its halves differ. Look for batch "
        "statistics, capacities or groups in the network, or for samples that are not on the first axis of its output."
    )


def _plain(model: nn.Module, inputs: Inputs, names: set[str], precision: Precision) -> tuple[Tensor, dict[str, Tensor]]:
    """Return random cotangents ``(S, B, ...)``, and the parameters' gradients ``(S, *shape)`` from each."""
    parameters = {name: value for name, value in model.named_parameters() if name in names}
    every = torch.arange(len(tensors(inputs)[0]), device="cpu")  # copies of them, which the network may overwrite
    with _requiring(list(parameters.values())), torch.enable_grad():
        output = precision.widened(precision.output(model, rows(inputs, every)))
        generator = torch.Generator().manual_seed(0)
        cotangents = torch.randn(NUM_SCORES, *output.shape, generator=generator, device="cpu").to(output)
        found: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for number, each in enumerate(cotangents):
            if number:
                output = precision.widened(precision.output(model, rows(inputs, every)))  # as a backward frees it
            pulled: Sequence[Tensor | None] = [None] * len(parameters)
            if output.requires_grad:
                pulled = pull_back(output, list(parameters.values()), each)
            for (name, value), gradient in zip(parameters.items(), pulled, strict=True):
                found[name].append(
                    precision.widened(torch.zeros_like(value) if gradient is None else gradient.detach())
                )
    return cotangents, {name: torch.stack(parts) for name, parts in found.items()}


@contextmanager
def _requiring(parameters: list[nn.Parameter]) -> Iterator[None]:
    flags = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def _different(one: dict[str, Tensor], other: dict[str, Tensor], precision: Precision) -> str | None:
    """Return the first parameter whose gradients differ by more than rounding, if there is one."""
    sizes = {name: max(float(value.norm()), float(other[name].norm())) for name, value in one.items()}
    least = precision.small * max(sizes.values(), default=0.0)
    for name, value in one.items():
        tolerance = precision.tolerance * max(sizes[name], least)
        if tolerance < float("inf") and float((value - other[name]).norm()) > tolerance:
            return name
    return None
