"""Linear datamodelling scores: how well attributions foretell what networks trained on subsets will answer.

    python -m tests.benchmarks.attribution.datamodels [--subsets 50] [--models 5] [--dims 128,512]

Digits: 1,000 training samples, 400 queries, subsets of 500. For each subset networks are trained from several seeds,
and their margins ``log p_y / (1 − p_y)`` at the queries averaged. An attribution foretells a subset's margin by the sum
over its samples; its score is Spearman's rank correlation over the subsets, averaged over the queries (Park et al.,
2023). All methods see the same networks, trained on all 1,000 samples; intervals are of 1,000 resamples of the queries,
also of the paired difference to TRAK of the same dimension.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fisher_ray
from fisher_ray.stages.attribution.vectors import label_scores
from tests.benchmarks.attribution import trak
from tests.benchmarks.ranks import spearman

NUM_TRAIN, NUM_QUERIES, SUBSET = 1000, 400, 500
EPOCHS, BATCH, LR = 15, 50, 0.1


def network(seed: int) -> nn.Module:
    """Return a small network that is not trained."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Return a network trained on some samples."""
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return ``log p_y / (1 − p_y)``, ``(B,)``."""
    logits = model(x).double()
    own = logits.gather(1, y[:, None])
    return own[:, 0] - logits.scatter(1, y[:, None], -torch.inf).logsumexp(1)


def fisher(model: nn.Module, dim: int, kind: str, x: Tensor, y: Tensor, q: Tensor, yq: Tensor) -> Tensor:
    """Return ``s_qᵀ (F + δ)⁻¹ s_i``, ``(Q, N)``, by the package's influence."""
    metric = fisher_ray.fit_metric(model, x, dim=dim, compression=kind, damping="auto")
    with torch.no_grad():
        rows = [
            label_scores(fisher_ray.features(model, metric, inputs).flatten(1), model(inputs), labels, "all")
            for inputs, labels in ((x, y), (q, yq))
        ]
    return rows[1] @ rows[0].T


def attributions(models: list[nn.Module], dims: list[int], x: Tensor, y: Tensor, q: Tensor, yq: Tensor) -> dict:
    """Return each method's attributions ``(Q, N)``, averaged over the networks."""
    found: dict[str, Tensor] = {}
    num_parameters = sum(parameter.numel() for parameter in models[0].parameters())

    def add(name: str, value: Tensor) -> None:
        found[name] = found.get(name, torch.zeros_like(value)) + value / len(models)

    left = torch.zeros(len(x))
    for number, model in enumerate(models):
        gradients = [
            torch.cat([g.clone() for g, _ in trak.score_gradients(model, iter([(a, b)]))]) for a, b in ((x, y), (q, yq))
        ]
        add("gradient product", gradients[1] @ gradients[0].T)
        unit = [nn.functional.normalize(g, dim=1) for g in gradients]
        add("gradient cosine", unit[1] @ unit[0].T)
        for dim in dims:
            projection = trak.Projection(num_parameters, dim, number)
            (rows, rest), (queries, _) = (trak.features(model, iter([pair]), projection) for pair in ((x, y), (q, yq)))
            add(f"TRAK, {dim}", trak.scores(rows, queries))
            left += rest / (len(models) * len(dims))
            for kind in ("kronecker", "random", "sketch"):
                add(f"influence by the Fisher, {kind}, {dim}", fisher(model, dim, kind, x, y, q, yq))
    return {name: value * left if name.startswith("TRAK") else value for name, value in found.items()}


def correlations(attribution: Tensor, members: Tensor, outcome: Tensor) -> np.ndarray:
    """Return Spearman's correlation of each query, ``(Q,)``.

    Args:
        attribution: ``(Q, N)``.
        members: of the subsets, ``(M, N)``, 0 or 1.
        outcome: ``(M, Q)``.
    """
    foretold = members.double() @ attribution.double().T
    return spearman(foretold.T.numpy(), outcome.T.numpy())


def interval(values: np.ndarray, seed: int = 0) -> str:
    """Return the mean and its 95 % interval over resampled queries."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(1000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Train, attribute, and print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--dims", default="128,512")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[: NUM_TRAIN + NUM_QUERIES]
    inputs = torch.from_numpy(images[order]).float().reshape(-1, 1, 8, 8) / 8 - 1
    targets = torch.from_numpy(labels[order])
    x, q = inputs[:NUM_TRAIN], inputs[NUM_TRAIN:]
    y, yq = targets[:NUM_TRAIN], targets[NUM_TRAIN:]
    generator = torch.Generator().manual_seed(1)
    members, outcome = torch.zeros(options.subsets, NUM_TRAIN), []
    for number in range(options.subsets):
        rows = torch.randperm(NUM_TRAIN, generator=generator)[:SUBSET]
        members[number, rows] = 1
        seeds = range(1000 * (number + 1), 1000 * (number + 1) + options.models)
        outcome.append(torch.stack([margins(trained(x[rows], y[rows], seed), q, yq) for seed in seeds]).mean(0))
    models = [trained(x, y, seed) for seed in range(options.models)]
    share = float(np.mean([(model(q).argmax(1) == yq).double().mean().item() for model in models]))
    print(f"{options.subsets} subsets, {options.models} networks each; of all samples {100 * share:.1f} % right")
    dims = [int(dim) for dim in options.dims.split(",")]
    found = {
        name: correlations(value, members, torch.stack(outcome))
        for name, value in attributions(models, dims, x, y, q, yq).items()
    }
    for name, values in found.items():
        peer = found.get(f"TRAK, {name.rpartition(', ')[2]}")
        beside = f"  less TRAK {interval(values - peer)}" if peer is not None and peer is not values else ""
        print(f"{name:45} {interval(values)}{beside}")


if __name__ == "__main__":
    main()
