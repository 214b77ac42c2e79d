"""Networks of every kind, in float64, with four classes where nothing else is said."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

CLASSES = 4


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, norm: Any, *, inplace: bool = False, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)
        self.relu, self.inplace = nn.ReLU(inplace=inplace), inplace
        self.skip = nn.Conv2d(width_in, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        if self.inplace:
            out += self.skip(x)
        else:
            out = out + self.skip(x)
        return self.relu(out)


def resnet(norm: Any, *, inplace: bool = False) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        ResidualBlock(4, 4, norm, inplace=inplace),
        ResidualBlock(4, 8, norm, inplace=inplace, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if it had been trained
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def convolutional(conv: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(2), nn.AdaptiveAvgPool1d(3), nn.Flatten(), head(3 * channels))


def head(width: int) -> nn.Module:
    return nn.Linear(width, CLASSES)


class Pooled(nn.Module):
    """Means over positions of what ``body`` makes of a sequence."""

    def __init__(self, body: nn.Module, width: int, *, batch_axis: int = 0) -> None:
        super().__init__()
        self.body, self.head, self.batch_axis = body, head(width), batch_axis

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_axis:
            return self.head(self.body(x.transpose(0, 1)).mean(0))
        return self.head(self.body(x).mean(1))


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Gpt(nn.Module):
    """A language model; its positions are an embedding of a range, its embeddings are tied."""

    def __init__(self, *, functional_head: bool = False, classes: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(7, 6)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.attention, self.up, self.down = SelfAttention(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.functional_head, self.classes = functional_head, classes
        if functional_head:
            del self.head
        else:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Any:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        x = x + self.attention(self.norm1(x))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        out = functional.linear(x, self.tokens.weight) if self.functional_head else self.head(x)
        return out.mean(1) if self.classes else out


class ThreeTimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(5, 5), nn.LayerNorm(5), head(5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.norm(self.layer(x)))
        return self.head(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 5))
        self.head = head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(checkpoint(self.body, x, use_reentrant=False) + x)


class Own(nn.Module):
    """A layer of the user's own, with raw parameters of several shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.scale, self.shift = (nn.Parameter(torch.randn(s)) for s in ((2, 5, 5), (5,), ()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix[0] + (x * self.scale) @ self.mix[1] + self.shift)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.words, self.join = nn.Conv2d(1, 3, 3), nn.Embedding(9, 4, padding_idx=0), nn.Bilinear(3, 4, 5)
        self.head = head(5)

    def forward(self, image: Tensor, words: Tensor) -> Any:
        return {"logits": self.head(torch.tanh(self.join(self.image(image).mean((2, 3)), self.words(words).mean(1))))}


class OutputObject:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class ReturnsObject(nn.Module):
    def __init__(self, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.body, self.as_tuple = nn.Linear(5, CLASSES), as_tuple

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        return (logits, {"hidden": x}) if self.as_tuple else OutputObject(logits)


class Vision(nn.Module):
    """Patches, a class token and positions that are raw parameters, an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class Frames(nn.Module):
    """Folds a clip's frames into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.over_time = nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Linear(3, 5)
        self.head = head(5)

    def forward(self, x: Tensor) -> Tensor:
        clips, frames = x.shape[:2]
        made = self.norm(self.conv(x.flatten(0, 1))).mean((2, 3))
        return self.head(torch.tanh(self.over_time(made).reshape(clips, frames, -1).mean(1)))


class Conv1D(nn.Module):
    """A linear layer whose weight is transposed; it stands for the one of transformers."""

    def __init__(self, width_out: int, width_in: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width_in, width_out)), nn.Parameter(torch.randn(width_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Grid(nn.Module):
    """Layers that never see the samples: a small network on coordinates, added to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.body = nn.Linear(2, 4), nn.Linear(4, 6), nn.Linear(6, 6)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        coordinates = torch.linspace(0, 1, 6, dtype=x.dtype).reshape(3, 2)
        return self.head(torch.tanh(self.body(x) + self.second(torch.tanh(self.first(coordinates)))).mean(1))


class LoraLinear(nn.Linear):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        self.down, self.up = nn.Parameter(torch.randn(2, width_in)), nn.Parameter(torch.randn(width_out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class TiedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1, groups=2) for _ in range(2))
        self.two.weight = self.one.weight
        self.norm1, self.norm2 = nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)
        self.norm2.weight = self.norm1.weight
        self.head = head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm2(self.two(torch.tanh(self.norm1(self.one(x)))))).mean((2, 3)))


class TiedTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = Conv1D(5, 5), nn.Linear(5, 5), head(5)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class InPlace(nn.Module):
    """Overwrites by hand what comes out of one layer and what goes into another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x).mul_(2))
        y = self.second(x.detach())
        return self.head(x + y.relu_())


class Mixer(nn.Module):
    """Has no parameters; is handed somebody else's."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(x @ weight)


class Lending(nn.Module):
    """Hands its parameters to a child, and to a function that a child holds without owning them."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.weight, self.embedding = Mixer(), nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 5)
        self.head = BorrowedHead(self.embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixer(self.embedding(x), self.weight))


class BorrowedHead(nn.Module):
    def __init__(self, lender: nn.Linear) -> None:
        super().__init__()
        self.lender = [lender]  # not registered
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x * self.scale, self.lender[0].weight)


class Composed(nn.Module):
    """Applies a function to itself and the inputs; its parts are given by name."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def table(length: int = 7, width: int = 6) -> nn.Module:
    return nn.Embedding(length, width)


def positions(function: Any) -> Any:
    """A classifier of tokens with positions, which ``function`` adds to what the tokens are embedded as."""

    def forward(self: Any, t: Tensor) -> Tensor:
        return self.head(torch.tanh(function(self.tokens(t), self.places(torch.arange(t.shape[1])))).mean(1))

    return lambda: Composed(forward, tokens=table(11), places=table(), head=head(6))


def queries() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        weights = torch.einsum("qd,bkd->bqk", self.project(self.query.weight), x).softmax(-1)
        return self.head(torch.tanh(weights @ x).flatten(1))

    return Composed(forward, query=table(2), project=nn.Linear(6, 6), head=head(12))


def relative_bias() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        places = torch.arange(3)
        bias = self.table(places[:, None] - places[None] + 2).permute(2, 0, 1).unsqueeze(0)  # (1, heads, 3, 3)
        q, k = (layer(x).unflatten(2, (2, 3)).transpose(1, 2) for layer in (self.q, self.k))
        return self.head((q @ k.transpose(2, 3) + bias).softmax(3).flatten(1))

    return Composed(forward, table=table(5, 2), q=nn.Linear(6, 6), k=nn.Linear(6, 6), head=head(18))


def tied_with_raw() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))) * self.gain)

    model = Composed(forward, one=nn.Linear(5, 5), two=nn.Linear(5, 5), gain=nn.Parameter(torch.randn(5)), head=head(5))
    model.two.weight = model.one.weight
    model.alias = model.one
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), Own(), nn.Linear(5, 5), head(5))
    for layer in (model[1], model[2]):
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.register_forward_hook(lambda module, args, output: output * 3)
    return model


class InPlaceScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x *= self.scale
        return functional.leaky_relu_(x)


def without_gradient() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = self.fixed(x)
        return self.head(torch.tanh(fixed) + self.moving(x))

    return Composed(forward, fixed=nn.Linear(5, 5), moving=nn.Linear(5, 5), head=head(5))


class Standardised(nn.Conv2d):
    """Standardises its weight, as in big transfer's networks."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, (weight - mean) / std, bias)


def patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), head(6))
    model[0].forward = lambda x, layer=model[0]: functional.linear(x, 2 * layer.weight, layer.bias)
    return model


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 6)), nn.Tanh(), head(6))


def remembering() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.last = torch.tanh(x * self.scale)
        return self.head(self.last)

    inner = Composed(forward, scale=nn.Parameter(torch.randn(5)), head=head(5), last=None)
    return nn.Sequential(nn.Linear(5, 5), inner)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.raw = nn.Linear(5, CLASSES), nn.Linear(5, 2), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def frozen_parts() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), head(5))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), head(6))


def vectors(*shape: int) -> Any:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def tokens(length: int, size: int = 11) -> Any:
    return lambda n: torch.randint(size, (n, length))


def _encoder(*, batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)
    return Pooled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 6, batch_axis=0 if batch_first else 1)


ZOO: dict[str, tuple[Any, Any]] = {
    "resnet, batch norm": (lambda: resnet(nn.BatchNorm2d), vectors(3, 8, 8)),
    "resnet, batch norm, in place": (lambda: resnet(nn.BatchNorm2d, inplace=True), vectors(3, 8, 8)),
    "resnet, group norm": (lambda: resnet(lambda width: nn.GroupNorm(2, width)), vectors(3, 8, 8)),
    "resnet, instance norm": (lambda: resnet(lambda w: nn.InstanceNorm2d(w, affine=True)), vectors(3, 8, 8)),
    "conv1d, grouped, dilated": (
        lambda: convolutional(nn.Conv1d(4, 6, 3, 2, 3, 2, groups=2), 6),
        vectors(4, 11),
    ),
    "conv1d, circular": (
        lambda: convolutional(nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), 3),
        vectors(2, 9),
    ),
    "conv2d, grouped, dilated": (
        lambda: convolutional(nn.Conv2d(4, 6, 3, (2, 1), (3, 0), (2, 1), groups=2), 6),
        vectors(4, 9, 7),
    ),
    "conv2d, reflect, same": (
        lambda: convolutional(nn.Conv2d(2, 3, (3, 4), padding="same", padding_mode="reflect"), 3),
        vectors(2, 6, 7),
    ),
    "conv2d, depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(12, 24, 3, padding=1, groups=12), nn.Tanh(), convolutional(nn.Conv2d(24, 12, 3, groups=12), 12)
        ),
        vectors(12, 6, 5),
    ),
    "conv3d, grouped, dilated": (
        lambda: convolutional(nn.Conv3d(4, 4, (2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 2), groups=2), 4),
        vectors(4, 4, 6, 5),
    ),
    "conv3d, replicate": (
        lambda: convolutional(nn.Conv3d(1, 3, 3, padding=1, padding_mode="replicate"), 3),
        vectors(1, 3, 4, 3),
    ),
    "transposed convolution": (
        lambda: convolutional(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), 4),
        vectors(3, 4, 5),
    ),
    "transformer encoder": (lambda: _encoder(batch_first=True), vectors(5, 6)),
    "transformer encoder, time first": (lambda: _encoder(batch_first=False), vectors(5, 6)),
    "language model, tied": (Gpt, tokens(7)),
    "language model, tied by a function": (lambda: Gpt(functional_head=True), tokens(7)),
    "vision transformer": (Vision, vectors(3, 8, 8)),
    "a module used three times": (ThreeTimes, vectors(5)),
    "checkpointing": (Checkpointed, vectors(5)),
    "a module of the user's own": (lambda: nn.Sequential(nn.Linear(3, 5), Own(), head(5)), vectors(3)),
    "two inputs by position": (TwoInputs, lambda n: (vectors(1, 5, 5)(n), tokens(4, 9)(n))),
    "two inputs by name": (TwoInputs, lambda n: {"words": tokens(4, 9)(n), "image": vectors(1, 5, 5)(n)}),
    "an object with logits": (ReturnsObject, vectors(5)),
    "a tuple": (lambda: ReturnsObject(as_tuple=True), vectors(5)),
    "frozen parts": (frozen_parts, vectors(5)),
    "frames folded into the batch": (Frames, vectors(3, 2, 5, 6)),
    "transposed linear": (lambda: nn.Sequential(Conv1D(6, 5), nn.Tanh(), Conv1D(CLASSES, 6)), vectors(5)),
    "transposed linear, tied": (TiedTransposed, vectors(5)),
    "layers that do not see the samples": (Grid, vectors(3, 6)),
    "weight norm": (weight_normed, vectors(5)),
    "a subclass with a forward of its own": (lambda: nn.Sequential(LoraLinear(5, 6), nn.Tanh(), head(6)), vectors(5)),
    "tied convolutions and norms": (TiedConvolutions, vectors(4, 5, 5)),
    "in place by hand": (InPlace, vectors(5)),
    "positions with an axis of their own": (positions(lambda x, p: x + p[None]), tokens(7)),
    "positions repeated": (positions(lambda x, p: x + p[None].repeat(len(x), 1, 1)), tokens(7)),
    "one position": (positions(lambda x, p: x + p), tokens(1)),
    "learned queries": (queries, vectors(4, 6)),
    "relative positions": (relative_bias, vectors(3, 6)),
    "tied layers beside a raw parameter": (tied_with_raw, vectors(5)),
    "the user's own hooks": (hooked, vectors(3)),
    "a module that overwrites its argument": (
        lambda: nn.Sequential(nn.Linear(5, 5), InPlaceScale(), head(5)),
        vectors(5),
    ),
    "a part without gradients": (without_gradient, vectors(5)),
    "standardised weights": (lambda: convolutional(Standardised(2, 3, 3), 3), vectors(2, 6, 6)),
    "a forward put on a layer": (patched, vectors(5)),
    "weight norm by hooks": (old_weight_norm, vectors(5)),
    "a module that keeps what it computed": (remembering, vectors(5)),
    "parameters handed on": (Lending, vectors(5)),
    "layers not reached": (Unused, vectors(5)),
    "norms of vectors": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6, bias=False), nn.Tanh(), nn.RMSNorm(6), head(6)),
        vectors(5),
    ),
    "norms of several axes": (
        lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.BatchNorm1d(3), nn.RMSNorm((3, 4)), nn.Flatten(), head(12)),
        vectors(3, 4),
    ),
    "bag of words": (
        lambda: nn.Sequential(OrderedDict(words=nn.EmbeddingBag(9, 5), tanh=nn.Tanh(), head=head(5))),
        tokens(4, 9),
    ),
    "preact, prelu": (lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), head(6)), vectors(5)),
}


def build(name: str, num_samples: int, seed: int = 0) -> tuple[nn.Module, Any]:
    factory, inputs = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory().double().eval()
        for parameter in model.parameters():
            if parameter.ndim < 2:  # norms' scales of 1 and shifts of 0 hide mistakes
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) / math.sqrt(4))
        return model, inputs(num_samples)
