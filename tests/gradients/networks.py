"""Networks whose gradients are compared with the oracle's; each is (model, inputs) in float64."""

import torch
from torch import Tensor, nn

from fisher_ray.models import mlp, paper_cnn


class Residual(nn.Module):
    """Takes one layer twice in a forward, and leaves another out."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.never = nn.Linear(6, 2)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.twice(torch.tanh(self.twice(x)))) + x)


class Tokens(nn.Module):
    """Applies a Linear at every position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7, bias=False)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x)).mean(dim=(1, 2)))


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)]


def _conv(**kwargs: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, **kwargs), nn.Tanh(), *_head(6))  # type: ignore[arg-type]


NETWORKS = {
    "cnn": (paper_cnn, (3, 24, 24)),
    "mlp": (lambda: mlp((12, 9, 8, 5)), (12,)),
    "strided grouped dilated": (lambda: _conv(kernel_size=3, stride=2, padding=3, dilation=2, groups=2), (4, 11, 9)),
    "depthwise without bias": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), *_head(8)), (4, 7, 7)),
    "oblong kernel": (lambda: _conv(kernel_size=(1, 3), stride=(2, 1), padding=(0, 2)), (4, 8, 6)),
    "padding same": (lambda: _conv(kernel_size=(3, 5), padding="same"), (4, 6, 7)),
    "padding valid": (lambda: _conv(kernel_size=2, padding="valid"), (4, 6, 7)),
    "padding reflect": (lambda: _conv(kernel_size=3, padding=2, padding_mode="reflect"), (4, 6, 7)),
    "padding circular": (lambda: _conv(kernel_size=3, padding=(1, 2), padding_mode="circular"), (4, 6, 7)),
    "padding replicate, grouped": (
        lambda: _conv(kernel_size=3, padding=1, padding_mode="replicate", groups=2),
        (4, 6, 7),
    ),
    "in-place activation": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), *_head(3)),
        (2, 6, 6),
    ),
    "in-place activation after a linear layer": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ELU(inplace=True), nn.Linear(8, 3)),
        (6,),
    ),
    "layer called twice, layer not called": (Residual, (6,)),
    "linear at every position": (Tokens, (2, 3, 5)),
    "batch norm in eval mode": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), *_head(3)).eval(),
        (2, 6, 6),
    ),
}


def make(name: str, num_samples: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    factory, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory().to(dtype).eval()
        return model, torch.randn(num_samples, *shape, dtype=dtype)
