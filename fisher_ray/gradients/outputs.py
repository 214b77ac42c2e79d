"""What goes into a network and comes out of it: tensors, alone or in tuples, mappings and objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fisher_ray.errors import ModelError, RequestError

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One tensor; several, by position; or several, by the names of the network's arguments. Samples on the first axis."""


_NOT_BATCHED = ("Batching rule", "vmap", "doesn't have storage")
"""In the messages of functions that cannot be vectorised, those that look into memory among them."""


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
    found = [value for value in _leaves(inputs)[0] if isinstance(value, Tensor)]
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
    leaves, structure = _leaves(inputs)
    made = [function(value) if isinstance(value, Tensor) else value for value in leaves]
    return cast(Inputs, tree_unflatten(made, structure))


def _leaves(inputs: Inputs) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(dict(inputs) if isinstance(inputs, Mapping) else inputs)


def signature(inputs: Inputs) -> tuple[Any, ...]:
    """Return what the inputs have in common with other batches that take the same way through a network."""
    leaves, structure = _leaves(inputs)
    return (str(structure), *map(_kind, leaves))


def _kind(value: Any) -> Any:
    """Return what may choose the way: a tensor's shape, or a flag, name or number; of anything else only its type."""
    if isinstance(value, Tensor):
        return tuple(value.shape[1:]), value.dtype
    return (type(value), value) if isinstance(value, bool | int | float | str | None) else type(value)


def outside_inference(inputs: Inputs) -> Inputs:
    """Return the inputs as tensors that may be part of a graph and are of none, copied if made in inference mode."""
    return _each(inputs, lambda value: value.clone() if value.is_inference() else value.detach())


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
        if batched and any(words in str(error) for words in _NOT_BATCHED):  # torch has no class for it
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
