"""Forward hooks that keep every layer's input and output, so that one backward to the outputs gives all factors.

Parameters do not require gradients meanwhile: no batch weight gradient and no gradient of the network's own input is
computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fisher_ray.errors import ModelError
from fisher_ray.gradients.layers import SUPPORTED, Block, blocks_of


@dataclass
class Trace:
    """What one forward pass left behind.

    Attributes:
        logits: ``(B, C)``, attached to the graph.
        calls: per layer name, each call's (input, output).
        hidden: the last layer's input ``(B, H)`` if the logits are a Linear's output, else None.
    """

    logits: Tensor
    calls: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    hidden: Tensor | None = None


def find_blocks(model: nn.Module, parameters: str = "*") -> list[Block]:
    """Return the blocks whose parameters match the glob ``parameters``, in the network's order.

    Raises:
        ModelError: if a matching parameter belongs to an unsupported layer, a layer's behaviour depends on its batch
            (BatchNorm, dropout in train mode), or nothing matches.
    """
    blocks: list[Block] = []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        _refuse_train_mode(name, module)
        own = {key for key, _ in module.named_parameters(recurse=False)}
        wanted = {key for key in own if fnmatchcase(f"{name}.{key}" if name else key, parameters)}
        if not wanted:
            continue
        if not isinstance(module, SUPPORTED):
            choices = ", ".join(sorted(kind.__name__ for kind in SUPPORTED))
            raise ModelError(
                f"layer {name!r} ({type(module).__name__}) has no gradient formula; supported: {choices}. "
                f"Leave its parameters out with scores.parameters (given {parameters!r})."
            )
        for key in wanted:
            owner = owners.setdefault(id(getattr(module, key)), name)
            if owner != name:
                raise ModelError(f"layers {owner!r} and {name!r} share their {key}: tied parameters are not supported")
        blocks += blocks_of(name, module, weight="weight" in wanted, bias="bias" in wanted)
    if not blocks:
        raise ModelError(f"no parameter of the network matches scores.parameters {parameters!r}")
    return blocks


def _refuse_train_mode(name: str, module: nn.Module) -> None:
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    what = f"layer {name!r} ({type(module).__name__})"
    if module.training and (dropout or batch_norm):
        raise ModelError(
            f"{what} is in train mode, so a sample's gradient would depend on its batch or on chance. "
            "Call model.eval() first."
        )
    if batch_norm and module.running_mean is None:
        raise ModelError(
            f"{what} keeps no running statistics, so a sample's gradient would depend on its batch in eval mode too. "
            "Build it with track_running_stats=True."
        )


def trace(model: nn.Module, inputs: Tensor, layers: Sequence[str]) -> Trace:
    """Run ``model`` on ``inputs`` ``(B, ...)`` and keep the calls of ``layers``.

    Raises:
        ModelError: if the output is not ``(B, C)`` logits, or a captured output was overwritten in place.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    linear_calls: list[tuple[Tensor, Tensor]] = []
    overwrites = any(getattr(module, "inplace", False) for module in model.modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if name in layers:
                if not output.requires_grad:
                    output.requires_grad_()
                calls[name].append((args[0].detach(), output))
                if overwrites:
                    output = output.clone()
            if isinstance(module, nn.Linear):
                linear_calls.append((args[0].detach(), output))  # the tensor that the network goes on with
            return output

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, SUPPORTED)]
    try:
        with _frozen(model), torch.enable_grad():
            output = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    logits = _check_logits(output, len(inputs))
    for name, kept in calls.items():
        if any(output._version for _, output in kept):
            raise ModelError(f"the output of layer {name!r} is overwritten in place. Use an out-of-place operation.")
    hidden = next((a for a, y in linear_calls if y is logits and a.ndim == 2), None)
    return Trace(logits, calls, hidden)


def _check_logits(logits: object, batch: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the network's output is {shape}, not logits of shape (B, C) with B = {batch}")
    return logits


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
