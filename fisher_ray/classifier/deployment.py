"""A classifier as a program of PyTorch's own operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from fisher_ray.errors import ModelError, RequestError

MIN_TRACED = 4
"""Samples in the batch that is traced, at least; their number becomes a symbol."""
WARM_UPS = 4
"""How often the function runs before, so that what it does with first batches is over."""

Predict = Callable[[Tensor], tuple[Tensor, Tensor]]


class _Traced(nn.Module):
    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        scores, probabilities = self.traced(inputs)
        return scores, probabilities


def export_program(predict: Predict, inputs: Tensor, *, any_batch: bool) -> ExportedProgram:
    """Trace a function of a batch, its backward passes included.

    ``torch.export`` alone cannot see into a backward pass; what is exported is the graph of the operations that it and
    the rest of the function run.

    Args:
        predict: from a batch ``(B, ...)`` to two tensors ``(B, ...)``; takes the same steps for every batch of this
            shape after the first few.
        inputs: an example, ``(B, ...)``, one sample at least.
        any_batch: whether the program is for batches of any size; else for those of the example's.

    Raises:
        RequestError: if there is no sample.
        ModelError: if the function cannot be traced.
    """
    if not len(inputs):
        raise RequestError("an example batch without samples was given. Give one sample at least.")
    shape, size = inputs.shape[1:], len(inputs)
    if any_batch:  # sizes that are equal would become one symbol
        size = next(number for number in itertools.count(MIN_TRACED) if number not in shape)
    inputs = inputs[torch.arange(size) % len(inputs)].clone()
    for _ in range(WARM_UPS):
        predict(inputs)

    def traced(batch: Tensor) -> tuple[Tensor, Tensor]:
        return predict(batch.reshape(batch.shape[0], *shape))  # make_fx makes symbols of all sizes; these are numbers

    sizes = ({0: Dim("batch")},) if any_batch else None
    try:
        graph = make_fx(traced, tracing_mode="symbolic" if any_batch else "fake", _allow_non_fake_inputs=True)(inputs)
        return torch.export.export(_Traced(graph).eval(), (inputs,), dynamic_shapes=sizes)
    except Exception as error:
        advice = "Export it with any_batch=False, for batches of one size." if any_batch else "Call the classifier."
        raise ModelError(
            f"the network cannot be exported: its steps depend on the data{' or the number of samples' * any_batch} "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). {advice}"
        ) from error
