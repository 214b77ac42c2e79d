"""How close a metric of low rank comes to the dense Fisher: its kernel, its trace, and what a reparametrisation does.

    python -m tests.benchmarks.metric.kernel [--data FOLDER] [--output FOLDER] [--base FILE.safetensors]

Three studies on CIFAR-10, each with a figure; all numbers are also printed and written to ``kernel.json``:

- the kernel of held-out samples, damped alike everywhere, against that of the dense Fisher of a small network, by rank,
  estimator, structure and compression. A metric of low rank has no part of the kernel outside its span, not even the
  dense one's ``gᵀg'/δ``;
- the share of the trace of the paper's network's Fisher that ``D`` Kronecker coordinates hold, and of that the share of
  the leading ``R`` eigenvalues; of the samples that both were fitted on, so at large ``R`` more than of fresh ones;
- how much the small network's kernel of held-out samples changes when what goes into each channel is multiplied by a
  factor from 0.2 to 5, and what comes out divided by it, by rank.

Without ``--base``, the network of ``jobs/configs/cifar10.yaml`` is trained and kept in ``runs/metric-accuracy``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fisher_ray import LowRankMetric, class_scores, features, fit_metric, pipeline
from fisher_ray.config import Config
from fisher_ray.data import load_batches, open_source
from fisher_ray.gradients import Compressor, ScoreEngine, square_norms
from fisher_ray.metric import choose_bases
from fisher_ray.metric.symmetric import add_gram, mirror
from fisher_ray.models import paper_cnn
from fisher_ray.records import Batch
from fisher_ray.stages.passes import kronecker_pass
from tests.benchmarks.metric import figures
from tests.metric.reparametrised import rescaled

DAMPING = 0.1
"""Of the dense Fisher's mean eigenvalue."""
RANKS = (16, 64, 256, 512, 1024)
"""Of the small network's metrics, besides all."""
RESCALED_RANKS = (*RANKS, 1280, 1408, 1536, 1568)
"""Where the kernels of the two networks are compared, besides all."""
COMPRESSED_DIM = 512
"""``D`` where the small network's scores are compressed."""
TRAIN_ROWS, METRIC_ROWS, HELD_OUT_ROWS = 5000, 800, 60
"""Of the small network's training, of its Fisher, and of the kernels."""
DIMS = (64, 256, 1024, 2048, 4096, 8192)
TRACE_RANKS = (64, 128, 256, 512, 1024, 2048, 4096)
TRACE_ROWS = 1500


def batches(config: Config, split: str, count: int, size: int) -> Iterator[Batch]:
    """Yield the first ``count`` rows of a split, ``size`` at a time."""
    data = config.data
    source = open_source(getattr(data, split), root=data.root, transform=data.transform, key=f"data.{split}")
    yield from load_batches(source, range(count), size, num_classes=10)


def inputs_of(config: Config, split: str, count: int) -> Tensor:
    """Return the first ``count`` inputs of a split, float64."""
    return torch.cat([batch.inputs for batch in batches(config, split, count, 256)]).double()


def small_network(config: Config) -> nn.Sequential:
    """Return the paper's network with 4 and 3 channels in place of 64, trained for four epochs, in float64."""
    torch.manual_seed(0)
    layers = OrderedDict(paper_cnn().named_children())
    layers |= {"conv0": nn.Conv2d(3, 4, 5, padding=1), "conv1": nn.Conv2d(4, 3, 5, padding=2), "fc": nn.Linear(108, 10)}
    model = nn.Sequential(layers)
    read = list(batches(config, "train", TRAIN_ROWS, 256))
    inputs, labels = torch.cat([batch.inputs for batch in read]), torch.cat([batch.labels for batch in read])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        for rows in torch.randperm(len(inputs)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimiser.step()
    return model.double().eval()


def whole_scores(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return ``√p_c s_c`` of all classes, ``(B · C, P)``."""
    with torch.no_grad():
        weights = model(inputs).softmax(dim=1).sqrt()
    found = class_scores(model, inputs)
    return (torch.cat([value.flatten(2) for value in found.values()], dim=2) * weights[:, :, None]).flatten(0, 1)


def kernel(model: nn.Module, metric: LowRankMetric, inputs: Tensor) -> Tensor:
    """Return the kernel of all inputs' scores, ``(B · C, B · C)``."""
    rows = features(model, metric, inputs).flatten(0, 1)
    return rows @ rows.T


def leading(metric: LowRankMetric, rank: int) -> LowRankMetric:
    """Return the metric that a fit with a lower rank gives: the largest eigenvalues of all parts."""
    lowest = metric.eigvals.sort(descending=True).values[min(rank, metric.rank) - 1]
    counts = [int((part.eigvals >= lowest).sum()) for part in metric.parts]
    parts = [
        replace(part, eigvals=part.eigvals[:count], eigvecs=part.eigvecs[:, :count])
        for part, count in zip(metric.parts, counts, strict=True)
    ]
    return replace(metric, parts=tuple(parts))


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the relative difference in the Frobenius norm."""
    return float(torch.linalg.norm(actual - expected) / torch.linalg.norm(expected))


def compared(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the relative error of the whole kernel, and of its entries between scores of different samples."""
    sample = torch.arange(len(expected)) * HELD_OUT_ROWS // len(expected)
    other = sample[:, None] != sample
    return {"error": difference(actual, expected), "between": difference(actual * other, expected * other)}


def fitted(
    model: nn.Module, inputs: Tensor, ways: dict[str, Any], most: int, damping: float
) -> Iterator[LowRankMetric]:
    """Yield a metric for each rank up to ``most``; a sketch has twice the columns and is made anew for each."""
    options = {**ways, "damping": {"absolute": damping}}
    ranks = [*(rank for rank in RANKS if rank < most), most]
    if ways["estimator"] in ("nystrom", "frequent_directions"):
        yield from (fit_metric(model, inputs, rank=rank, **options) for rank in ranks)
    else:
        whole = fit_metric(model, inputs, **options)
        yield from (leading(whole, rank) for rank in ranks)


def kernel_errors(model: nn.Module, inputs: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Return the relative error of every metric's kernel, and the best that a multiple of plain dot products does."""
    scores, fresh = whole_scores(model, inputs), whole_scores(model, held_out)
    fisher = scores.T @ scores / len(inputs)
    dim, damping = len(fisher), DAMPING * float(fisher.diagonal().mean())
    dense = fresh @ torch.linalg.solve(fisher + damping * torch.eye(dim, dtype=torch.float64), fresh.T)
    plain = fresh @ fresh.T
    ways = [("identity", "exact", structure) for structure in ("global", "adjacent", "block")]
    ways += [("identity", estimator, "global") for estimator in ("nystrom", "frequent_directions", "diagonal")]
    ways += [(compression, "exact", "global") for compression in ("kronecker", "random", "sketch")]
    found = []
    for way in ways:
        named = dict(zip(("compression", "estimator", "structure"), way, strict=True))
        most = dim if way[0] == "identity" else COMPRESSED_DIM
        for metric in fitted(model, inputs, {**named, "dim": COMPRESSED_DIM}, most, damping):
            errors = compared(kernel(model, metric, held_out), dense)
            found.append({**named, "dim": metric.dim, "rank": metric.rank, **errors})
            _print_errors(f"{', '.join(way):40} D = {metric.dim:5} R = {metric.rank:5}", errors)
    euclidean = compared(plain * ((plain * dense).sum() / plain.square().sum()), dense)
    _print_errors("the best multiple of plain dot products", euclidean)
    eigvals = torch.linalg.eigvalsh(fisher)
    effective = float((eigvals / (eigvals + damping)).sum())
    print(f"effective dimension {effective:.0f} of {dim}", flush=True)
    return {"num_parameters": dim, "effective_dim": effective, "euclidean": euclidean, "metrics": found}


def _print_errors(name: str, errors: dict[str, float]) -> None:
    print(f"{name:62}  error {errors['error']:.2e}, between samples {errors['between']:.2e}", flush=True)


def captured_trace(config: Config, base: Path) -> list[dict[str, Any]]:
    """Return by ``D`` the share of the whole trace in the coordinates, and by ``R`` the eigenvalues' share of that."""
    model = paper_cnn()
    model.load_state_dict(safetensors.torch.load_file(base))
    engine = ScoreEngine(model.eval())
    rows = partial(batches, config, "shallow", TRACE_ROWS, 16)
    moments = kronecker_pass(engine, engine.block_shapes, rows(), "all", 0)
    bases = {dim: choose_bases(moments, engine.block_shapes, dim) for dim in DIMS}
    compressor = Compressor(bases[DIMS[-1]], engine.blocks, engine.like)
    whole, total = 0.0, torch.zeros(compressor.dim, compressor.dim, dtype=torch.float64)
    for batch in rows():
        scores = engine.all_classes(batch.inputs)
        whole += sum(square_norms(scores).values())
        add_gram(total, compressor.compress(scores).flatten(0, 1))
    mirror(total)
    found = []
    for dim in DIMS:  # a layer's coordinates descend, so fewer are its first
        places = [(compressor.places[name].start, basis.dim) for name, basis in bases[dim].items()]
        kept = torch.cat([torch.arange(start, start + count) for start, count in places])
        eigvals = torch.linalg.eigvalsh(total[kept][:, kept]).flip(0)
        shares = {rank: float(eigvals[:rank].sum() / eigvals.sum()) for rank in TRACE_RANKS if rank <= dim}
        found.append({"dim": dim, "share": float(eigvals.sum()) / whole, "captured": shares})
        line = "  ".join(f"{rank}: {share:.3f}" for rank, share in shares.items())
        print(f"D = {dim:5} holds {found[-1]['share']:.3f} of the trace; of that, R holds  {line}", flush=True)
    return found


def rescaling_changes(model: nn.Sequential, inputs: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Return by rank how much the rescaled network's kernels differ, and how much plain dot products do."""
    models = model, rescaled(model)
    metrics = [fit_metric(each, inputs, compression="identity", damping=DAMPING) for each in models]
    found = []
    for rank in [*RESCALED_RANKS, max(metric.rank for metric in metrics)]:
        kept = [leading(metric, rank) for metric in metrics]
        undamped = [replace(each, parts=tuple(replace(part, damping=0.0) for part in each.parts)) for each in kept]
        line: dict[str, Any] = {"rank": kept[0].rank, "rank_rescaled": kept[1].rank}
        for name, pair in (("damped", kept), ("undamped", undamped)):
            before, after = (kernel(each, metric, held_out) for each, metric in zip(models, pair, strict=True))
            line[name] = difference(after, before)
        found.append(line)
        print(f"rescaled, R = {line['rank']:5}: changed by {line['damped']:.2e}, undamped {line['undamped']:.2e}")
    before, after = (scores @ scores.T for scores in (whole_scores(each, held_out) for each in models))
    print(f"rescaled, plain dot products: changed by {difference(after, before):.2e}", flush=True)
    return {"euclidean": difference(after, before), "metrics": found}


def base_file(config: Config) -> Path:
    """Train the base network, unless the run folder has it."""
    pipeline.run(config, until="base")
    return Path(config.output) / "base" / "model.safetensors"


def main() -> None:
    """Measure, print, write JSON and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.path.abspath("../shared/data/cifar10"))
    parser.add_argument("--output", type=Path, default=Path("tests/benchmarks/metric/results"))
    parser.add_argument("--base", type=Path, help="weights of the paper's network")
    options = parser.parse_args()
    start = time.perf_counter()
    asked = [f"data.root={options.data}", "output=runs/metric-accuracy"]
    config = Config.from_yaml("jobs/configs/cifar10.yaml", asked)
    model = small_network(config)
    inputs, held_out = inputs_of(config, "shallow", METRIC_ROWS), inputs_of(config, "test", HELD_OUT_ROWS)
    found: dict[str, Any] = {"kernel_errors": kernel_errors(model, inputs, held_out)}
    found["rescaling"] = rescaling_changes(model, inputs, held_out)
    found["trace"] = captured_trace(config, options.base or base_file(config))
    print(f"{time.perf_counter() - start:.0f} s")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "kernel.json").write_text(json.dumps(found, indent=1) + "\n")
    figures.draw_kernel_errors(found["kernel_errors"], options.output / "kernel_errors.svg")
    figures.draw_trace(found["trace"], options.output / "captured_trace.svg")
    figures.draw_rescaling(found["rescaling"], options.output / "rescaling.svg")


if __name__ == "__main__":
    main()
