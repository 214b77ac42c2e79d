"""What is measured: the paper's CNN, a multilayer perceptron, a small transformer, a residual network."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fisher_ray.models import mlp, paper_cnn

TOKENS = "tests.benchmarks.gradients.workloads:as_tokens"
"""A run's transform of samples that are numbers of tokens."""


def as_tokens(values: np.ndarray, generator: torch.Generator | None) -> Tensor:
    """Leave integers as they are."""
    return torch.from_numpy(values)


@dataclass
class Workload:
    """One network and a batch.

    Attributes:
        name: ``W1`` to ``W4``.
        model: in eval mode.
        inputs: ``(B, ...)``.
        labels: ``(B,)``.
        width: columns on either side of a two-sided projection.
        precision: what the network's operations are cast to; None for float32.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    width: int
    precision: torch.dtype | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which other ways than this package's run the network."""
        return torch.autocast(self.inputs.device.type, self.precision, enabled=self.precision is not None)


class Attention(nn.Module):
    """Self-attention out of two linear layers, of one operation if ``fused``."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """One layer of a transformer."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, fused)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Layers on tokens, and classes of the mean."""

    def __init__(
        self,
        width: int = 256,
        num_tokens: int = 2048,
        length: int = 64,
        layers: int = 4,
        heads: int = 4,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(num_tokens, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads, fused) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.layers(self.tokens(tokens) + self.positions(places)).mean(1))


def gpt2_small(length: int = 512) -> nn.Module:
    """A network of the shape of GPT-2's smallest, of 124 million parameters, and classes of the mean."""
    return Transformer(768, 50_257, length, layers=12, heads=12, fused=True)


class Residual(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            self.short = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(out + self.short(x))


def resnet18() -> nn.Module:
    """The ResNet-18 of pictures of 32 × 32: no stride and no pooling at the beginning."""
    stages: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    before = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        stages += [Residual(before, width, stride), Residual(width, width, 1)]
        before = width
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def workload(
    name: str, device: str = "cpu", precision: torch.dtype | None = None, batch: int | None = None
) -> Workload:
    """Build one of the workloads, with weights and inputs that are always the same; ``batch`` for another size."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "W1":
        model, inputs, width = paper_cnn(), torch.randn(batch or 128, 3, 24, 24), 32
    elif name == "W2":
        model, inputs, width = mlp((784, 1024, 1024, 10)), torch.randn(batch or 256, 784), 64
    elif name == "W3":
        model, inputs, width = Transformer(), torch.randint(2048, (batch or 32, 64)), 16
    elif name == "W4":
        model, inputs, width = resnet18(), torch.randn(batch or 64, 3, 32, 32), 32
    else:
        raise ValueError(f"workload {name!r}; known: W1, W2, W3, W4")
    labels = torch.arange(len(inputs)) % 10
    return Workload(name, model.eval().to(device), inputs.to(device), labels.to(device), width, precision)
