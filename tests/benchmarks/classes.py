"""Many classes: what a pass costs and how far its dot products are off, by the number of buckets that classes share.

    python -m tests.benchmarks.classes [--folder FIGURES]

Cost: compressed scores of a batch of the paper's network with a head of C classes, over those of ten, medians of
interleaved rounds. Error: of 1,000 classes, the root mean square of what dot products of the scores of two samples are
off, over that of the products of all classes themselves; beside it the same of labels drawn from the network's own
distribution, of which scores are as many. Of two networks: one with random weights, which thinks all classes likely,
and one trained on points about 1,000 centres until it is right in about half of the cases.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional

from fisher_ray.gradients import Compressor, ScoreEngine, Softmax, bucketed, random_bases
from fisher_ray.models import mlp, paper_cnn
from fisher_ray.records import Batch
from fisher_ray.stages.passes import compressed_scores

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = (2, 10, 32, 64, 128, 300, 1000)
BUCKETS = (4, 8, 16, 32, 64, 128, 256)
NUM_BUCKETS, MICRO_BATCH, ROUNDS, SEEDS = 64, 8, 7, 4
MANY, WIDTH, SAMPLES = 1000, 64, 200


def costs() -> dict[str, list[float]]:
    """Return seconds of a batch by number of classes, each by itself and in buckets."""
    runs: dict[tuple[str, int], Callable[[], object]] = {}
    inputs = torch.randn(MICRO_BATCH, 3, 24, 24)
    batch = Batch(inputs, torch.zeros(MICRO_BATCH, dtype=torch.int64), torch.arange(MICRO_BATCH))
    for num_classes in CLASSES:
        model = paper_cnn(num_classes).eval()
        for kind, buckets in (("each class", None), (f"{NUM_BUCKETS} buckets", (NUM_BUCKETS, 0))):
            engine = ScoreEngine(model, "conv1.*", bucketed(Softmax(), buckets))
            compressor = Compressor(random_bases(engine.blocks, 32, 0), engine.blocks, engine.like)
            runs[kind, num_classes] = lambda e=engine, c=compressor: compressed_scores(e, c, batch, "all", 0)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for number in range(ROUNDS + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if number:  # the first looks at the network
                seconds[key].append(time.perf_counter() - start)
    kinds = dict.fromkeys(kind for kind, _ in runs)
    return {kind: [statistics.median(seconds[kind, num_classes]) for num_classes in CLASSES] for kind in kinds}


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return networks of 1,000 classes and samples for each."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = torch.randn(MANY, WIDTH, generator=generator)

    def points(number: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(MANY, (number,), generator=generator)
        return centres[labels] + 1.6 * torch.randn(number, WIDTH, generator=generator), labels

    untrained, trained = (mlp((WIDTH, 128, MANY)) for _ in range(2))
    optimiser = torch.optim.Adam(trained.parameters(), 2e-3)
    samples, truth = points(SAMPLES)
    while float((trained(samples).argmax(1) == truth).float().mean()) < 0.5:
        inputs, labels = points(2048)
        optimiser.zero_grad()
        functional.cross_entropy(trained(inputs), labels).backward()
        optimiser.step()
    return {"random weights": (untrained.eval(), samples), "right in half of the cases": (trained.eval(), samples)}


def scores_of(model: nn.Module, inputs: Tensor, buckets: tuple[int, int] | None) -> Tensor:
    """Return compressed scores ``(B, S, D)``."""
    engine = ScoreEngine(model, "fc0.*", bucketed(Softmax(), buckets))
    compressor = Compressor(random_bases(engine.blocks, 16, 0), engine.blocks, engine.like)
    zeros = torch.zeros(len(inputs), dtype=torch.int64)
    batches = (Batch(x, zeros[: len(x)], zeros[: len(x)]) for x in inputs.split(20))
    return torch.cat([compressed_scores(engine, compressor, batch, "all", 0)[2] for batch in batches])


def products(left: Tensor) -> Tensor:
    """Return the dot products of different samples."""
    kernel = left.flatten(1) @ left.flatten(1).T
    return kernel[~torch.eye(len(kernel), dtype=torch.bool)]


def errors(model: nn.Module, inputs: Tensor) -> dict[str, list[float]]:
    """Return relative errors of dot products by number of buckets, and of as many drawn labels."""
    every = scores_of(model, inputs, None)
    exact = products(every)
    with torch.no_grad():
        probabilities = model(inputs).softmax(1)
    plain = every / probabilities.sqrt()[..., None]
    found: dict[str, list[float]] = {"buckets": [], "drawn labels": []}
    for number in BUCKETS:
        off: dict[str, list[Tensor]] = {name: [] for name in found}
        for seed in range(SEEDS):
            off["buckets"].append(products(scores_of(model, inputs, (number, seed))) - exact)
            off["drawn labels"].append(products(drawn(plain, probabilities, number, seed)) - exact)
        for name, values in off.items():
            found[name].append(float(torch.stack(values).square().mean().sqrt() / exact.square().mean().sqrt()))
    return found


def drawn(plain: Tensor, probabilities: Tensor, number: int, seed: int) -> Tensor:
    """Return weighted scores of all classes of which only those drawn are there, as often as they were, ``(B, C, D)``.

    A class that is drawn ``n`` of ``S`` times has the weight ``n / (S √p)``, which is ``√p`` on average.
    """
    labels = torch.multinomial(probabilities, number, True, generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros_like(probabilities).scatter_add_(1, labels, torch.ones(labels.shape))
    return plain * (counts / (number * probabilities.sqrt()))[..., None]


def draw(path: Path, seconds: dict[str, list[float]], found: dict[str, dict[str, list[float]]]) -> None:
    """Draw both, as SVG and PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, values in seconds.items():
        left.loglog(CLASSES, [value / seconds["each class"][1] for value in values], marker="o", label=kind)
    left.set(xlabel="classes", ylabel="time of a batch over that of ten classes")
    for network, kinds in found.items():
        for kind, values in kinds.items():
            right.loglog(BUCKETS, values, marker="o", ls="-" if kind == "buckets" else ":", label=f"{kind}, {network}")
    right.set(xlabel="buckets, or labels drawn, of 1,000 classes", ylabel="relative error of dot products")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    path.mkdir(parents=True, exist_ok=True)
    for kind in ("svg", "png"):
        figure.savefig(path / f"classes.{kind}", dpi=150)


def table(head: Sequence[object], rows: dict[str, list[float]]) -> str:
    """Return a Markdown table."""
    lines = [["", *map(str, head)], ["---"] * (1 + len(head))]
    lines += [[name, *(f"{value:.3g}" for value in values)] for name, values in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, print both tables, draw both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    seconds = costs()
    print(table(CLASSES, {kind: [value / seconds["each class"][1] for value in row] for kind, row in seconds.items()}))
    found = {name: errors(*pair) for name, pair in networks().items()}
    print(table(BUCKETS, {f"{kind}, {name}": row for name, kinds in found.items() for kind, row in kinds.items()}))
    if options.folder is not None:
        draw(options.folder, seconds, found)


if __name__ == "__main__":
    main()
