"""The work that every library is given: a network, training rows, queries, and how it should come out.

A folder holds ``train.npz`` and ``test.npz`` (``inputs``, ``labels``), ``network.safetensors``, and ``exact.npy``: dot
products of the exact gradients of the first queries and training rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fisher_ray.models import paper_cnn
from tests.benchmarks.gradients.workloads import Transformer

NUM_CLASSES, NUM_TOKENS, LENGTH = 10, 2048, 64
NUM_STEPS = {"W1": 150, "W3": 25}
"""Of training."""
EXACT_QUERIES, EXACT_ROWS = 32, 256
"""Of the subset with exact dot products."""


def cnn() -> nn.Module:
    """Return the paper's network in eval mode."""
    return paper_cnn().eval()


def transformer() -> nn.Module:
    """Return the transformer in eval mode, all but its linear layers frozen: the peers project no others."""
    model = Transformer(num_tokens=NUM_TOKENS, length=LENGTH).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad_(True)
    return model


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of work.

    Attributes:
        factory: of the network.
        batch: samples at a time in the peers.
        dim: numbers that stay of a sample's gradient, or of one layer's where ``by_layer``.
        by_layer: whether every linear layer is projected by itself.
        libraries: that can do it.
    """

    factory: Callable[[], nn.Module]
    batch: int
    dim: int
    by_layer: bool
    libraries: tuple[str, ...]


OWN = ("fisher_ray", "fisher_ray on Ray")
KINDS = {
    "W1": Kind(cnn, 128, 2048, False, (*OWN, "trak", "dattri")),
    "W3": Kind(transformer, 32, 256, True, (*OWN, "bergson", "dattri", "logix")),
}


@dataclass(frozen=True)
class Work:
    """One kind of work, read from its folder.

    Attributes:
        name: ``W1`` or ``W3``.
        kind: what it is.
        folder: of its files.
        model: with the trained weights.
        train: inputs and labels.
        queries: inputs and labels.
    """

    name: str
    kind: Kind
    folder: Path
    model: nn.Module
    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]


def load(folder: Path) -> Work:
    """Read a folder of :func:`prepare`."""
    name = json.loads((folder / "work.json").read_text())["name"]
    model = KINDS[name].factory()
    model.load_state_dict(load_file(folder / "network.safetensors"))
    parts = []
    for file in ("train", "test"):
        with np.load(folder / f"{file}.npz") as found:
            parts.append((torch.from_numpy(found["inputs"]), torch.from_numpy(found["labels"])))
    return Work(name, KINDS[name], folder, model, parts[0], parts[1])


def prepare(name: str, folder: Path, num_rows: int, num_queries: int) -> Work:
    """Write a folder: samples of noisy classes, a network trained on them for a moment, exact dot products."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    make = _pictures if name == "W1" else _sequences
    inputs, labels = make(num_rows + num_queries, generator)
    model = KINDS[name].factory()
    _train(model, inputs[:num_rows], labels[:num_rows], NUM_STEPS[name], generator)
    save_file(model.state_dict(), folder / "network.safetensors")
    for file, rows in (("train", slice(num_rows)), ("test", slice(num_rows, None))):
        np.savez(folder / f"{file}.npz", inputs=inputs[rows].numpy(), labels=labels[rows].numpy())
    (folder / "work.json").write_text(json.dumps({"name": name}))
    work = load(folder)
    np.save(folder / "exact.npy", _exact(work).numpy())
    return work


def _pictures(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(NUM_CLASSES, (number,), generator=generator)
    coarse = torch.randn(NUM_CLASSES, 3, 6, 6, generator=generator)
    means = functional.interpolate(coarse, size=(24, 24), mode="bilinear")
    return 0.25 * means[labels] + torch.randn(number, 3, 24, 24, generator=generator), labels


def _sequences(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(NUM_CLASSES, (number,), generator=generator)
    chances = torch.randn(NUM_CLASSES, NUM_TOKENS, generator=generator).mul(0.5).softmax(1)
    return torch.multinomial(chances[labels], LENGTH, replacement=True, generator=generator), labels


def _train(model: nn.Module, inputs: Tensor, labels: Tensor, num_steps: int, generator: torch.Generator) -> None:
    """A moment of training, in which the network learns some of the classes and is not yet sure of them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for _ in range(num_steps):
        rows = torch.randint(len(inputs), (32,), generator=generator)
        functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def _exact(work: Work) -> Tensor:
    """Return the dot products ``(Q, N)`` of a subset's gradients, each from a backward of its own."""
    parameters = [parameter for parameter in work.model.parameters() if parameter.requires_grad]

    def gradient(part: tuple[Tensor, Tensor], row: int) -> Tensor:
        loss = functional.cross_entropy(work.model(part[0][row : row + 1]), part[1][row : row + 1])
        return torch.cat([value.flatten() for value in torch.autograd.grad(loss, parameters)])

    queries = torch.stack([gradient(work.queries, row) for row in range(min(EXACT_QUERIES, len(work.queries[1])))])
    return torch.stack([queries @ gradient(work.train, row) for row in range(min(EXACT_ROWS, len(work.train[1])))], 1)
