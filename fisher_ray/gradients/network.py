"""The parameters of a network whose gradients are taken, as blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fisher_ray.errors import ModelError
from fisher_ray.gradients.blocks import Block, single
from fisher_ray.gradients.layers import Layer, Part, layer_of


@dataclass
class Parameters:
    """What was chosen of a network's parameters.

    Attributes:
        names: the parameters, in the network's order; one that has several names stands under its first.
        blocks: they as blocks, in the network's order.
        layers: formulas, by module name.
        parts: by module name, what its formula gives.
    """

    names: list[str]
    blocks: list[Block] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=lambda: defaultdict(list))


def choose_parameters(model: nn.Module, parameters: str | Collection[str] = "*") -> Parameters:
    """Return the parameters that match a glob, or are named, and are not frozen; in a network frozen whole, all.

    Raises:
        ModelError: if nothing matches, or a layer's behaviour depends on its batch or on chance (batch normalisation
            or dropout in train mode).
    """
    for name, module in model.named_modules():
        _refuse_unusable(name, module)
    refuse_train_mode(model)
    found = Parameters(_chosen(model, parameters))
    owners: dict[Tensor, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in set(filter(_present, module._parameters.values())):
            owners[parameter].append(name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shared: dict[str, Block] = {}
    for name, module in model.named_modules():
        own = {key: names[id(value)] for key, value in module._parameters.items() if value is not None}
        keys = {key for key, parameter in own.items() if parameter in found.names}
        if not keys:
            continue
        layer = layer_of(name, module, own)
        if layer is not None:
            found.layers[name] = layer
            if not any(len(owners[module._parameters[key]]) > 1 for key in keys):
                found.parts[name] = layer.blocks(keys)
                found.blocks += [part.block for part in found.parts[name]]
                continue
        for key in (key for key in own if key in keys):
            if own[key] not in shared:
                shared[own[key]] = single(own[key], tuple(module._parameters[key].shape))
                found.blocks.append(shared[own[key]])
            if layer is not None:
                found.parts[name].append(Part(shared[own[key]], key == "weight", key == "bias", shared=True))
    return found


def _present(value: Tensor | None) -> bool:
    return value is not None


def _chosen(model: nn.Module, parameters: str | Collection[str]) -> list[str]:
    every = dict(model.named_parameters())
    if isinstance(parameters, str):
        names = [name for name in every if fnmatchcase(name, parameters)]
        if any(value.requires_grad for value in every.values()):
            names = [name for name in names if every[name].requires_grad]
        if not names:
            raise ModelError(f"no parameter of the network matches scores.parameters {parameters!r}, frozen ones aside")
        return names
    if missing := sorted(set(parameters) - every.keys()):
        raise ModelError(f"the network has no parameter {missing[0]!r}")
    return [name for name in every if name in parameters]


def _refuse_unusable(name: str, module: nn.Module) -> None:
    what = f"layer {name!r} ({type(module).__name__})"
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{what} is compiled by torch.jit, which hides its parts. Give the module it was made from.")
    for key, parameter in module._parameters.items():
        if parameter is None:
            continue
        if nn.parameter.is_lazy(parameter):
            raise ModelError(f"{what}: {key} has no shape yet. Call the network once before.")
        if parameter.is_complex():
            raise ModelError(f"{what}: {key} is complex. Leave real and imaginary parts as two real parameters.")


def refuse_train_mode(model: nn.Module) -> None:
    """Raise a ModelError if a layer's behaviour depends on its batch or on chance."""
    for name, module in model.named_modules():
        _refuse_train_mode(name, module)


def _refuse_train_mode(name: str, module: nn.Module) -> None:
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    attention = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    running = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
    running |= type(module).__name__ == "_SpectralNorm"
    what = f"layer {name!r} ({type(module).__name__})"
    if module.training and (dropout or attention or batch_norm or running):
        raise ModelError(
            f"{what} is in train mode, so a sample's gradient would depend on its batch or on chance. "
            "Call model.eval() first."
        )
    if batch_norm and module.running_mean is None:
        raise ModelError(
            f"{what} keeps no running statistics, so a sample's gradient would depend on its batch in eval mode too. "
            "Build it with track_running_stats=True."
        )
