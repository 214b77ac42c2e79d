"""Fisher sums, factor sums, damping and kernel, formed densely, one sample and one class at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference.gradients import weighted_scores

Call = tuple[str, Tensor, Tensor]


def rows_by_layer(model: nn.Module) -> Tensor:
    """Where each entry of the layers' matrices ``(O, A)``, bias last in a row, stands among the flat parameters."""
    places, start = {}, 0
    for name, parameter in model.named_parameters():
        places[name] = torch.arange(start, start + parameter.numel()).reshape(len(parameter), -1)
        start += parameter.numel()
    layers = dict.fromkeys(name.rpartition(".")[0] for name in places)
    matrices = [
        [places[f"{layer}.{key}"] for key in ("weight", "bias") if f"{layer}.{key}" in places] for layer in layers
    ]
    return torch.cat([torch.cat(parts, dim=1).flatten() for parts in matrices])


def scores(model: nn.Module, inputs: Tensor) -> Tensor:
    """``√p_c s_c``, ``(B, C, P)``, layer by layer, each as its matrix ``(O, A)`` row by row."""
    return weighted_scores(model, inputs)[:, :, rows_by_layer(model)]


def fisher(model: nn.Module, inputs: Tensor) -> Tensor:
    """``Σ_x Σ_c p_c s_c s_cᵀ``, ``(P, P)``, one outer product after the other."""
    total: Tensor | float = 0.0
    for sample in scores(model, inputs):
        for score in sample:
            total = total + torch.outer(score, score)
    return torch.as_tensor(total)


def factor_sums(model: nn.Module, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor, int]]:
    """By layer: ``Σ a aᵀ`` over samples and positions, ``Σ p_c δ δᵀ`` over classes too, and samples times positions."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    for x in inputs:
        logits, calls = _forward(model, layers, x[None])
        logs = logits.log_softmax(dim=1)[0]
        for name, value, output in calls:
            a = _patches(layers[name], value)
            total_in, total_out, count = sums.get(name, (torch.zeros(()), torch.zeros(()), 0))
            for log in logs:
                (gradient,) = torch.autograd.grad(log, output, retain_graph=True)
                delta = _columns(layers[name], gradient) * log.detach().exp().sqrt()
                total_out = total_out + sum(torch.outer(column, column) for column in delta.T)
            total_in = total_in + sum(torch.outer(column, column) for column in a.T)
            sums[name] = total_in, total_out, count + a.shape[1]
    return sums


def _forward(model: nn.Module, layers: dict[str, nn.Module], x: Tensor) -> tuple[Tensor, list[Call]]:
    calls: list[Call] = []

    def keep(name: str):
        return lambda module, args, output: calls.append((name, args[0].detach(), output))

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, calls


def _patches(layer: nn.Module, value: Tensor) -> Tensor:
    """One sample's layer input as columns ``(A, T)``, a one below each where there is a bias."""
    if isinstance(layer, nn.Conv2d):
        (high, wide), (down, right), (step_down, step_right) = layer.kernel_size, layer.stride, layer.dilation
        image = nn.functional.pad(value[0], (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0]))
        reach_down, reach_right = (high - 1) * step_down + 1, (wide - 1) * step_right + 1
        columns = [
            image[:, top : top + reach_down : step_down, left : left + reach_right : step_right].flatten()
            for top in range(0, image.shape[1] - reach_down + 1, down)
            for left in range(0, image.shape[2] - reach_right + 1, right)
        ]
    else:
        columns = list(value.reshape(-1, value.shape[-1]))
    matrix = torch.stack(columns, dim=1)
    return matrix if layer.bias is None else torch.cat([matrix, torch.ones_like(matrix[:1])])


def _columns(layer: nn.Module, gradient: Tensor) -> Tensor:
    """One sample's gradient at a layer's output as columns ``(O, T)``."""
    return gradient[0].flatten(1) if isinstance(layer, nn.Conv2d) else gradient.reshape(-1, gradient.shape[-1]).T


def best_low_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Cut the singular value decomposition (Eckart & Young, 1936)."""
    left, values, right = np.linalg.svd(matrix)
    return left[:, :rank] @ np.diag(values[:rank]) @ right[:rank]


def held_out_loss(fitted: np.ndarray, held: np.ndarray, rank: int, damping: float) -> float:
    """``tr M − log det M`` of the held-out matrix ``M`` whitened by the leading eigenvectors of the fitted one."""
    values, vectors = np.linalg.eigh(fitted)
    leading = vectors[:, ::-1][:, :rank]
    root = np.diag(1 / np.sqrt(values[::-1][:rank] + damping))
    whitened = root @ leading.T @ held @ leading @ root
    sign, log_determinant = np.linalg.slogdet(whitened)
    return float(np.trace(whitened) - log_determinant) if sign > 0 else math.inf


def damped_kernel(a: np.ndarray, b: np.ndarray, fisher: np.ndarray, damping: float) -> np.ndarray:
    """``aᵀ (F + δ I)⁻¹ b`` for all rows of ``a`` and ``b``."""
    return a @ np.linalg.inv(fisher + damping * np.eye(len(fisher))) @ b.T


def undamped_kernel(a: np.ndarray, b: np.ndarray, fisher: np.ndarray) -> np.ndarray:
    """``aᵀ F⁺ b`` for all rows of ``a`` and ``b``; eigenvalues below 1e-11 of the largest count as zero."""
    return a @ np.linalg.pinv(fisher, rcond=1e-11, hermitian=True) @ b.T
