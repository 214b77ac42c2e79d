"""What goes into a network and comes out of it: tensors, alone or in tuples, mappings and objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fisher_ray.errors import ModelError, RequestError

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One tensor; several, by position; or several, by the names of the network's arguments. Samples on the first axis."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call ``model`` on its inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def tensors(inputs: Inputs) -> list[Tensor]:
    """Return the tensors among the inputs.

    Raises:
        RequestError: if there are none, or their first axes differ.
    """
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else [inputs]
    )
    found = [value for value in values if isinstance(value, Tensor)]
    sizes = [value.shape[0] if value.ndim else 0 for value in found]  # not len(), which makes a symbol a number
    if not found or not sizes[0] or any(size != sizes[0] for size in sizes):
        shapes = ", ".join(str(tuple(value.shape)) for value in found) or "no tensor"
        raise RequestError(f"inputs are {shapes}. Give tensors with one sample or more on the first axis of each.")
    return found


def rows(inputs: Inputs, index: Tensor) -> Inputs:
    """Return copies of some of the samples."""
    return _each(inputs, lambda value: value[index])


def _each(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to every tensor of the inputs."""

    def made(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return {name: made(value) for name, value in inputs.items()}
    return cast(Inputs, tree_map(made, inputs))


def signature(inputs: Inputs) -> tuple[Any, ...]:
    """Return what the inputs have in common with other batches that take the same way through a network."""
    named = inputs.items() if isinstance(inputs, Mapping) else enumerate(tensors(inputs))
    return tuple((key, tuple(value.shape[1:]), value.dtype) for key, value in named if isinstance(value, Tensor))


def outside_inference(inputs: Inputs) -> Inputs:
    """Return the inputs as tensors that may be part of a graph, copied where they were made in inference mode."""
    return _each(inputs, lambda value: value.clone() if value.is_inference() else value)


def main_output(output: Any) -> Tensor:
    """Return the tensor that the likelihood is of: ``output``, its ``logits``, or the first of a tuple.

    Raises:
        ModelError: if there is none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the network's output is {type(output).__name__}: not a tensor, a tuple that starts with one, or an "
            "object with logits"
        )
    if not torch.is_floating_point(found):
        raise ModelError(f"the network's output is of {found.dtype}, which has no gradient")
    return found


def pull_back(
    output: Tensor, wanted: Sequence[Tensor], cotangents: Tensor, *, batched: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients at ``wanted``, None where ``output`` does not depend on one.

    Args:
        output: part of a graph, as are ``wanted``.
        wanted: tensors.
        cotangents: of ``output``'s shape, or ``(S, *shape)`` if ``batched``.
        batched: whether there are several.

    Raises:
        ModelError: if a part of the network is checkpointed in a way that gives no gradients of single tensors.
    """
    if batched and any(isinstance(size, torch.SymInt) for size in cotangents.shape):
        return _one_by_one(output, wanted, cotangents)  # while it is traced: some batching rules need numbers
    try:
        return torch.autograd.grad(
            output, wanted, cotangents, is_grads_batched=batched, allow_unused=True, retain_graph=batched
        )
    except RuntimeError as error:
        if batched and any(word in str(error) for word in ("Batching rule", "vmap")):  # torch has no class for it
            return _one_by_one(output, wanted, cotangents)
        if "use_reentrant" not in str(error):
            raise
        raise ModelError(
            "the network checkpoints activations in the older way. Pass use_reentrant=False to torch.utils.checkpoint."
        ) from error


def _one_by_one(output: Tensor, wanted: Sequence[Tensor], cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Return what a batched backward would, for a graph with a function that cannot be vectorised."""
    rows = [torch.autograd.grad(output, wanted, row, allow_unused=True, retain_graph=True) for row in cotangents]
    columns = zip(*rows, strict=True)
    return tuple(None if parts[0] is None else torch.stack([p for p in parts if p is not None]) for parts in columns)
