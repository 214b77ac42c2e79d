"""Pairs of a ReLU network and the same function of the inputs with other parameters; float64, always the same."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def spread_matrix(generator: torch.Generator, dim: int, decades: float) -> Tensor:
    """A random square matrix whose singular values go over so many decades."""
    left, right = (
        torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    return left * torch.logspace(0, -decades, dim, dtype=torch.float64) @ right


class Fixed(nn.Module):
    """A linear map that is no parameter."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class TwoSided(nn.Module):
    """A linear layer of weights ``A V B`` whose parameter is ``V``."""

    def __init__(self, layer: nn.Linear, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.inner = nn.Parameter(torch.linalg.solve(left, layer.weight.detach()) @ torch.linalg.inv(right))
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.left @ self.inner @ self.right, self.bias)


def dense_network() -> nn.Sequential:
    """Inputs ``(B, 4)``, 83 parameters, 11 hidden units, 3 classes."""
    return _drawn(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), seed=18)


def convolutional_network() -> nn.Sequential:
    """Inputs ``(B, 2, 8, 8)``, 160 parameters, 7 channels, 3 classes."""
    first = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return _drawn(nn.Sequential(*first, nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), seed=0)


def _drawn(model: nn.Sequential, seed: int) -> nn.Sequential:
    """Draw the parameters; the seeds are such that every hidden unit is on for some inputs and off for others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * values if parameter.ndim == 1 else values / parameter[0].numel() ** 0.5)
    return model


def rescaled(model: nn.Sequential) -> nn.Sequential:
    """Multiply what goes into each hidden unit or channel by a factor of its own, and what comes out of it by 1/factor.

    Between linear maps there may only be what passes a positive factor on: ReLU, max-pooling, flattening.
    """
    other = copy.deepcopy(model)
    maps = [layer for layer in other if isinstance(layer, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for before, after in itertools.pairwise(maps):
            factors = torch.logspace(-0.7, 0.7, len(before.bias), dtype=torch.float64)
            before.weight.mul_(factors.view(-1, *[1] * (before.weight.ndim - 1)))
            before.bias.mul_(factors)
            each = factors.repeat_interleave(after.weight.shape[1] // len(factors))  # positions of one channel
            after.weight.div_(each.view(1, -1, *[1] * (after.weight.ndim - 2)))
    return other


def rescaled_layers() -> tuple[nn.Module, nn.Module]:
    model = dense_network()
    return model, rescaled(model)


def rescaled_convolutions() -> tuple[nn.Module, nn.Module]:
    model = convolutional_network()
    return model, rescaled(model)


def between_fixed_maps() -> tuple[nn.Module, nn.Module]:
    """The first layer has weights ``A W B``, between fixed layers that undo it."""
    model, (left, right) = dense_network(), _two_matrices(6, 4)
    first, *rest = copy.deepcopy(model)
    with torch.no_grad():
        first.weight.copy_(left @ first.weight @ right)
        first.bias.copy_(left @ first.bias)
    return model, nn.Sequential(Fixed(torch.linalg.inv(right)), first, Fixed(torch.linalg.inv(left)), *rest)


def two_sided_parameter() -> tuple[nn.Module, nn.Module]:
    """The middle layer's parameter is ``V``, its weights are ``A V B``."""
    model = dense_network()
    first, activation, middle, *rest = copy.deepcopy(model)
    return model, nn.Sequential(first, activation, TwoSided(middle, *_two_matrices(5, 6)), *rest)


def _two_matrices(*dims: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [spread_matrix(generator, dim, 1) for dim in dims]


def weight_normalised() -> tuple[nn.Module, nn.Module]:
    """The middle layer's weights are ``g v / |v|``, row by row."""
    model = dense_network()
    other = copy.deepcopy(model)
    weight_norm(other[2])
    return model, with_other_lengths(other)


def weight_normalised_convolution() -> tuple[nn.Module, nn.Module]:
    """The second convolution's weights are ``g v / |v|``, channel by channel."""
    model = convolutional_network()
    other = copy.deepcopy(model)
    weight_norm(other[3])
    return model, with_other_lengths(other)


def with_other_lengths(model: nn.Module) -> nn.Module:
    """Multiply each ``v`` of weight normalisation by a factor from 1/4 to 1: the weights stay what they are.

    Where ``|v| = g``, as torch starts, dot products of gradients are those of the weights themselves.
    """
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("original1"):
                factors = torch.logspace(-2, 0, len(parameter), base=2, dtype=torch.float64)
                parameter.mul_(factors.view(-1, *[1] * (parameter.ndim - 1)))
    return other
