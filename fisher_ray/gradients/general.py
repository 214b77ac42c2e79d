"""Gradients of a module without a formula: a vector-Jacobian product of the module alone, vectorised over samples.

An operation that torch has no batching rule for is looped over the samples by torch: correct, and slower.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_unflatten

from fisher_ray.errors import ModelError
from fisher_ray.gradients.blocks import Block
from fisher_ray.gradients.capture import Call, Site
from fisher_ray.gradients.factors import FormedFactors
from fisher_ray.gradients.memory import is_out_of_memory
from fisher_ray.gradients.outputs import main_output
from fisher_ray.gradients.precision import Precision, multiplied

_NOT_IN_HALF: WeakSet[nn.Module] = WeakSet()
"""Modules that run under autocast but can only be vectorised without: some of a GPU's kernels are like that."""
_LOG = logging.getLogger(__name__)


def formed_factors(
    call: Call, deltas: list[Tensor | None], precision: Precision, scales: Tensor | None
) -> list[FormedFactors]:
    """Return the gradients of a site's ``parameters`` from one of its calls.

    Args:
        call: the call.
        deltas: the gradients at its outputs, ``(S, ...)``, None where the network does not depend on one.
        precision: what the network was run in, as the module is.
        scales: what to multiply by, ``(S, B)``, if anything.

    Raises:
        ModelError: if the module cannot be vectorised.
    """
    site = call.site
    samples = [
        axis.outermost(value)
        for value, axis in zip(call.arguments, call.layout.arguments, strict=True)
        if axis is not None
    ]
    pulled = [
        axis.outermost(delta, 1)  # (S, B, k, ...)
        for axis, delta in zip(call.layout.outputs, deltas, strict=True)
        if axis is not None and delta is not None
    ]
    reached = [delta is not None for delta in deltas]

    def gradients_in(around: AbstractContextManager[object], call: Call, *parts: list[Tensor]) -> dict[str, Tensor]:
        with _vectorising(), _restoring(site.module), around:
            made: dict[str, Tensor] = vmap(partial(_of_sample, call, reached), in_dims=(0, 1))(*parts)
        return made

    def widely() -> dict[str, Tensor]:
        wide = replace(call, arguments=[_wide(value, precision) for value in call.arguments])
        parts = ([_wide(value, precision) for value in part] for part in (samples, pulled))
        return gradients_in(precision.outside(site.module), wide, *parts)

    try:
        try:
            if site.module in _NOT_IN_HALF:
                gradients = widely()
            else:
                gradients = gradients_in(precision.around(site.module), call, samples, pulled)
        except RuntimeError as error:
            if precision.forward is None or is_out_of_memory(error) or site.module in _NOT_IN_HALF:
                raise
            gradients = widely()
            _NOT_IN_HALF.add(site.module)
            _LOG.info("layer %r is differentiated in %s: %s", site.name, precision.factors, str(error).split("\n")[0])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise ModelError(
            f"layer {site.name!r} ({type(site.module).__name__}) has no gradient formula and cannot be vectorised over "
            f"samples: {reason} Leave its parameters ({', '.join(site.parameters)}) out with scores.parameters."
        ) from error
    _check_shapes(site, gradients, pulled[0].shape[1::-1])
    scales = None if scales is None else scales.T
    found = {name: multiplied(precision.widened(value), scales) for name, value in gradients.items()}
    return [FormedFactors(block, _joined(block, site.parameters, found)) for block in site.blocks]


def _check_shapes(site: Site, gradients: Mapping[str, Tensor], leading: tuple[int, ...]) -> None:
    parameters = dict(site.module.named_parameters())
    for name in site.parameters.values():
        if gradients[name].shape != (*leading, *parameters[name].shape):
            raise ModelError(
                f"layer {site.name!r} ({type(site.module).__name__}) has no gradient formula, and vectorised over "
                f"samples its gradient of {name} is {tuple(gradients[name].shape)}: leave it out with scores.parameters"
            )


def _wide(value: Any, precision: Precision) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.to(precision.factors) if half else value


@contextmanager
def _vectorising() -> Iterator[None]:
    """Take attention's plain formula, as fused kernels cannot be vectorised, and accept operations that torch loops."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        yield


@contextmanager
def _restoring(module: nn.Module) -> Iterator[None]:
    """Put back what a module keeps of a call: inside it are tensors that are none outside the vectorised function."""
    own: list[dict[str, Any]] = []
    for part in module.modules():
        own += [part.__dict__, cast(dict[str, Any], part._buffers), cast(dict[str, Any], part._parameters)]
    before = [dict(values) for values in own]
    try:
        yield
    finally:
        for values, kept in zip(own, before, strict=True):
            values.clear()
            values.update(kept)


def _of_sample(call: Call, reached: list[bool], sample: list[Tensor], deltas: list[Tensor]) -> dict[str, Tensor]:
    """Return one sample's gradients ``(S, *shape)``, from its arguments ``(k, ...)`` and ``deltas`` ``(S, k, ...)``."""
    site, layout = call.site, call.layout
    values = {name: parameter.detach() for name, parameter in site.module.named_parameters()}
    wanted = {name: values.pop(name) for name in site.parameters.values()}

    def outputs(parameters: dict[str, Tensor]) -> list[Tensor]:
        given = iter(sample)
        flat = [
            value if axis is None else next(given).movedim(0, axis.dim).clone()  # which the module may overwrite
            for value, axis in zip(call.arguments, layout.arguments, strict=True)
        ]
        args, kwargs = tree_unflatten(flat, call.structure)
        made = functional_call(site.module, {**values, **parameters}, args, kwargs)
        leaves = tree_leaves(made) if site.name else [main_output(made)]
        return [
            axis.outermost(leaf)[0]
            for leaf, axis, wanted in zip(leaves, layout.outputs, reached, strict=True)
            if wanted and axis is not None
        ]

    pull = vjp(outputs, wanted)[1]
    if all(type(part).__module__.startswith("torch.nn.") for part in site.module.modules()):
        gradients: dict[str, Tensor] = vmap(lambda *parts: pull(list(parts))[0])(*deltas)
        return gradients
    # Vectorised twice, some operations that a user's module may use are wrong, as the backward of torch.cdist.
    each = [pull(list(parts))[0] for parts in zip(*deltas, strict=True)]
    return {name: torch.stack([found[name] for found in each]) for name in wanted}


def _joined(block: Block, names: Mapping[str, str], gradients: dict[str, Tensor]) -> Tensor:
    """Return ``(B, S, O, A)`` of the parameters' gradients ``(B, S, *shape)``."""
    columns = []
    for piece in block.pieces:
        part = gradients[names[piece.parameter]]
        part = part if piece.rows is None else part[:, :, piece.rows]
        part = part.reshape(*part.shape[:2], -1, piece.shape[-1]) if piece.transposed else part
        columns.append(
            part.transpose(2, 3) if piece.transposed else part.reshape(*part.shape[:2], block.num_outputs, -1)
        )
    return torch.cat(columns, dim=3)
