"""Accuracy of the linear model on CIFAR-10 by rank, compression and structure of the metric, at equal feature size.

    python -m tests.benchmarks.metric.accuracy [--data FOLDER] [--output FOLDER] [--train-rows 8000] [--test-rows 4000]

The base network is that of ``jobs/configs/cifar10.yaml``, trained once and kept in the output folder. Its scores are
compressed once for each compression; every metric is fitted on the first rows of the shallow split, and ridge
regression on standardised features, the last hidden layer beside them, is solved in its dual form, which costs
the same for any number of features. The penalty is chosen on a tenth of the training rows, cut off at the end, and the
model is then fitted on all of them; test rows are only counted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fisher_ray import pipeline
from fisher_ray.config import Config, MetricConfig
from fisher_ray.data import load_batches, open_source
from fisher_ray.gradients import Compressor, ScoreEngine
from fisher_ray.metric import FisherSum, LowRankMetric, plan_compression
from fisher_ray.stages.compression import choose_compression
from fisher_ray.stages.passes import kronecker_pass
from fisher_ray.stages.workbench import base_network
from fisher_ray.storage import Storage
from tests.benchmarks.metric.figures import draw_accuracies

RANKS = (64, 256, 1024, 4096)
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
WAYS = [
    ("kronecker", "exact", "global", RANKS),
    ("kronecker", "exact", "adjacent", RANKS[:3]),
    ("kronecker", "exact", "block", RANKS[:3]),
    ("kronecker", "diagonal", "global", RANKS[:3]),
    ("kronecker", "nystrom", "global", (1024,)),
    ("kronecker", "frequent_directions", "global", (256,)),
    ("random", "exact", "global", (1024,)),
    ("sketch", "exact", "global", (1024,)),
    ("topk", "exact", "global", (1024,)),
]
"""Compression, estimator, structure, ranks."""
MICRO_BATCH = 16


class Rows:
    """Compressed scores ``(C, N, D)``, hidden layers and labels of training and then test rows."""

    def __init__(self, engine: ScoreEngine, config: Config, counts: dict[str, int]) -> None:
        """See the class."""
        self.engine, self.config, self.counts = engine, config, counts

    def batches(self, split: str, count: int) -> Iterator:
        """Yield the first ``count`` rows of a split."""
        data = self.config.data
        source = open_source(getattr(data, split), root=data.root, transform=data.transform, key=f"data.{split}")
        yield from load_batches(source, range(min(count, len(source))), MICRO_BATCH, num_classes=10)

    def compress(self, compressor: Compressor) -> tuple[Tensor, Tensor, Tensor]:
        """Return compressed scores ``(C, N, D)``, hidden layers ``(N, H)`` and labels ``(N,)``."""
        scores, hidden, labels, place = None, [], [], 0
        total = sum(self.counts.values())
        for split, count in self.counts.items():
            for batch in self.batches(split, count):
                made = self.engine.all_classes(batch.inputs)
                values = compressor.compress(made).transpose(0, 1)
                if scores is None:
                    scores = torch.empty(values.shape[0], total, values.shape[2])
                scores[:, place : place + values.shape[1]] = values
                place += values.shape[1]
                hidden.append(made.hidden)
                labels.append(batch.labels)
        return scores, torch.cat(hidden), torch.cat(labels)


def ridge(kernel: Tensor, labels: Tensor, num_train: int) -> tuple[float, float]:
    """Return test accuracy and the penalty, from the kernel ``(N, num_train)`` of standardised features.

    Penalties are relative to the kernel's mean diagonal times the ratio of rows to features, as those of the package's
    ridge regression are: a share of the standardised Gram matrix's mean diagonal, the number of rows.
    """
    targets = torch.nn.functional.one_hot(labels, 10).double()
    held = num_train // 10
    fit, best, chosen = num_train - held, -1.0, 0.0
    for penalty in PENALTIES:
        predicted = _solve(kernel, targets, fit, slice(fit, num_train), penalty)
        accuracy = float((predicted.argmax(1) == labels[fit:num_train]).double().mean())
        if accuracy > best:
            best, chosen = accuracy, penalty
    predicted = _solve(kernel, targets, num_train, slice(num_train, None), chosen)
    return float((predicted.argmax(1) == labels[num_train:]).double().mean()), chosen


def _solve(kernel: Tensor, targets: Tensor, fit: int, rows: slice, penalty: float) -> Tensor:
    """Predict rows by conjugate gradients on the dual problem, all classes at once, to a residual of 1e-3."""
    square, mean = kernel[:fit, :fit], targets[:fit].mean(0)
    wanted = (targets[:fit] - mean).float()
    weights, residual = torch.zeros_like(wanted), wanted.clone()
    direction, norms = residual.clone(), residual.square().sum(0)
    limit = 1e-6 * norms
    for _ in range(500):
        moved = square @ direction + penalty * fit * direction
        step = norms / (direction * moved).sum(0)
        weights += step * direction
        residual -= step * moved
        before, norms = norms, residual.square().sum(0)
        if bool((norms <= limit).all()):
            break
        direction = residual + norms / before * direction
    return (kernel[rows, :fit] @ weights).double() + mean


def standardised(features: Tensor, num_train: int) -> Tensor:
    """Return columns with mean 0 and variance 1 over the training rows."""
    mean, scale = features[:num_train].mean(0), features[:num_train].std(0)
    return (features - mean) / scale.clamp(min=1e-12)


def kernel_of(metric: LowRankMetric, scores: Tensor, num_train: int) -> Tensor:
    """Return the products of all rows' standardised features with the training rows', ``(N, num_train)``."""
    total = torch.zeros(scores.shape[1], num_train)
    for compressed in scores:
        features = standardised(metric.transform(compressed), num_train)
        total.addmm_(features, features[:num_train].T)
    return total


def fit_metric(bases: dict, settings: MetricConfig, scores: Tensor, num_rows: int) -> LowRankMetric:
    """Fit a metric on the first rows of compressed scores ``(C, N, D)``."""
    sums = FisherSum(settings, {name: basis.dim for name, basis in bases.items()}, seed=0)
    for start in range(0, num_rows, 256):
        rows = torch.arange(start, min(num_rows, start + 256))
        sums.add(scores[:, rows].transpose(0, 1), rows)
    return LowRankMetric(bases, *sums.decompose(sums.to_arrays()), {})


def cut(metric: LowRankMetric, rank: int) -> LowRankMetric:
    """Keep the ``rank`` largest eigenvalues over all parts."""
    smallest = metric.eigvals.sort(descending=True).values[rank - 1]
    parts = []
    for part in metric.parts:
        count = int((part.eigvals >= smallest).sum())
        parts += [replace(part, eigvals=part.eigvals[:count], eigvecs=part.eigvecs[:, :count])] if count else []
    return replace(metric, parts=tuple(parts))


def compressed(rows: Rows, kind: str, dim: int, metric_rows: int) -> tuple[dict, Tensor, Tensor, Tensor]:
    """Return bases of one kind, and all rows' compressed scores, hidden layers and labels."""
    start, engine = time.perf_counter(), rows.engine
    asked = rows.config.compression.model_copy(update={"kind": kind, "dim": dim})
    moments = None
    if plan_compression(asked, engine.block_shapes).with_moments:
        moments = kronecker_pass(engine, engine.block_shapes, rows.batches("shallow", metric_rows), "all", 0)
    bases = choose_compression(asked, engine.blocks, moments, 0)
    scores, hidden, labels = rows.compress(Compressor(bases, engine.blocks, engine.like))
    print(f"{kind}: D = {scores.shape[2]}, compressed in {time.perf_counter() - start:.0f} s", flush=True)
    return bases, scores, hidden, labels


def metrics(bases: dict, scores: Tensor, metric_rows: int, way: tuple) -> Iterator[LowRankMetric]:
    """Yield the metrics of one way by rank; damped by a number, which standardised columns do not show."""
    _, estimator, structure, ranks = way
    ranks = [rank for rank in ranks if rank <= scores.shape[2]]
    asked = {"estimator": estimator, "structure": structure, "damping": 0.1}
    if estimator in ("exact", "diagonal"):  # the leading ones of the same eigenvectors
        whole = fit_metric(bases, MetricConfig.checked({**asked, "rank": max(ranks)}), scores, metric_rows)
        yield from (cut(whole, rank) for rank in ranks)
        return
    for rank in ranks:
        yield fit_metric(bases, MetricConfig.checked({**asked, "rank": rank}), scores, metric_rows)


def measure(rows: Rows, kinds: list[str], dim: int, metric_rows: int) -> Iterator[dict]:
    """Yield a line for the last hidden layer alone, and one for each metric."""
    num_train, told = rows.counts["shallow"], False
    for kind in kinds:
        bases, scores, hidden, labels = compressed(rows, kind, dim, metric_rows)
        probe = standardised(hidden, num_train)
        probe_kernel = probe @ probe[:num_train].T
        if not told:
            told, (accuracy, penalty) = True, ridge(probe_kernel, labels, num_train)
            yield {
                "compression": "none, the last hidden layer alone",
                "rank": 0,
                "accuracy": accuracy,
                "penalty": penalty,
            }
        for way in (way for way in WAYS if way[0] == kind):
            for metric in metrics(bases, scores, metric_rows, way):
                kernel = kernel_of(metric, scores, num_train).add_(probe_kernel)
                accuracy, penalty = ridge(kernel, labels, num_train)
                line = dict(zip(("compression", "estimator", "structure"), way, strict=False))
                line |= {"rank": metric.rank, "accuracy": accuracy, "penalty": penalty}
                yield {**line, "captured": metric.summary()["captured"]}


def main() -> None:
    """Measure, print a line for each metric, write JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.path.abspath("../shared/data/cifar10"))
    parser.add_argument("--output", default="runs/metric-accuracy")
    parser.add_argument("--train-rows", type=int, default=8000)
    parser.add_argument("--test-rows", type=int, default=4000)
    parser.add_argument("--metric-rows", type=int, default=2500)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--compressions", default=",".join(dict.fromkeys(way[0] for way in WAYS)))
    options = parser.parse_args()
    config = Config.from_yaml("jobs/configs/cifar10.yaml", [f"data.root={options.data}", f"output={options.output}"])
    pipeline.run(config, until="base")
    engine = ScoreEngine(base_network(config.located(), Storage(config.located().output)))
    rows = Rows(engine, config, {"shallow": options.train_rows, "test": options.test_rows})
    found = []
    for line in measure(rows, options.compressions.split(","), options.dim, options.metric_rows):
        found.append(line)
        print(json.dumps(line), flush=True)
    folder = Path(options.output)
    (folder / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_accuracies(found, folder / "accuracy.svg")


if __name__ == "__main__":
    main()
