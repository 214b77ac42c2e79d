"""Memory and time of what one actor does for the metric of a network of 25 million parameters.

    python -m tests.benchmarks.metric.large [--samples 320] [--micro-batch 32] [--side 64] [--json FILE]

A ResNet-50 (He et al., 2016; random weights, batch normalisation in eval mode) and random pictures. Compression is
``kronecker`` to 1,024 coordinates, the metric of rank 256, ``labels: sampled`` with one draw. One process does
everything in turn: the pass for the moments, the choice of the bases from read-only arrays, as an object store gives
them, the pass for the Fisher, its decomposition, and the features of one batch. After every step its seconds and the
process's peak resident memory so far are printed; libraries, network and pictures are counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_ray.config import CompressionConfig, MetricConfig
from fisher_ray.gradients import Compressor, ScoreEngine
from fisher_ray.metric import FisherSum, LowRankMetric
from fisher_ray.records import Batch
from fisher_ray.stages.compression import choose_compression, plan
from fisher_ray.stages.passes import batch_features, fisher_pass, kronecker_pass
from tests.benchmarks.process import memory

LIMIT_BYTES = 6e9
DIM, RANK = 1024, 256
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Width and number of blocks."""


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        """Make the layers."""
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Identity()
        if stride != 1 or width_in != 4 * width:
            projection = nn.Conv2d(width_in, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, 4 width, ...)``."""
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        return (self.bn3(self.conv3(out)) + self.shortcut(x)).relu()


def resnet50(num_classes: int = 1000) -> nn.Sequential:
    """Return the network, in eval mode: 25.6 million parameters for 1,000 classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, padding=1))
    width_in = 64
    for number, (width, count) in enumerate(STAGES):
        for block in range(count):
            layers.append(Bottleneck(width_in, width, 2 if number and not block else 1))
            width_in = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, num_classes)]
    return nn.Sequential(*layers).eval()


class Steps:
    """Seconds and peak memory of one step after another."""

    def __init__(self) -> None:
        """See the class."""
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        start = time.perf_counter()
        yield
        seconds, peak = time.perf_counter() - start, memory("VmHWM")
        self.found[name] = {"seconds": seconds, "peak_bytes": peak}
        print(f"{name:24} {seconds:7.1f} s   peak {peak / 1e9:5.2f} GB", flush=True)


def measure(samples: int, micro_batch: int, side: int, num_classes: int) -> dict[str, Any]:
    """Run every step, and return what each took."""
    steps = Steps()
    torch.manual_seed(0)
    with steps.step("network"):
        model = resnet50(num_classes)
        inputs, index = torch.randn(samples, 3, side, side), torch.arange(samples)
        engine = ScoreEngine(model)
        batches = [
            Batch(inputs[rows], torch.zeros(len(rows), dtype=torch.int64), rows) for rows in index.split(micro_batch)
        ]
    metric, compression = MetricConfig(rank=RANK, labels="sampled"), CompressionConfig(kind="kronecker", dim=DIM)
    layers = plan(compression, metric, engine.block_shapes).with_moments
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size} parameters in {len(engine.block_shapes)} blocks, {samples} samples of {side}×{side}")
    with steps.step("moments"):
        moments = kronecker_pass(engine, layers, batches, "sampled", 0)
    moment_bytes = sum(array.nbytes for array in moments.values())
    for array in moments.values():
        array.setflags(write=False)
    with steps.step("bases"):
        bases = choose_compression(compression, engine.blocks, moments, 0)
    del moments
    with steps.step("fisher"):
        compressor = Compressor(bases, engine.blocks, torch.zeros(()))
        sums = FisherSum(metric, {name: basis.dim for name, basis in bases.items()}, 0)
        arrays = fisher_pass(engine, compressor, sums, batches, "sampled", 0)
    with steps.step("decomposition"):
        found = LowRankMetric(bases, *sums.decompose(arrays), {})
    with steps.step("features"):
        made = batch_features(engine, compressor, found.transform, batches[0], labels="sampled", seed=0, views=1)
    assert made is not None
    assert bool(made.values.isfinite().all())
    print(f"rank {found.rank}, {found.dim} coordinates in {len(bases)} blocks; moments {moment_bytes / 1e9:.2f} GB")
    return {"parameters": size, "rank": found.rank, "moment_bytes": moment_bytes, "steps": steps.found}


def main() -> None:
    """Measure, say whether it fits, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: Callable[..., Any] = partial(parser.add_argument, type=int)
    for name, value in (("samples", 320), ("micro-batch", 32), ("side", 64), ("classes", 1000), ("threads", 1)):
        number(f"--{name}", default=value)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.samples, options.micro_batch, options.side, options.classes)
    peak = max(step["peak_bytes"] for step in found["steps"].values())
    print(f"peak {peak / 1e9:.2f} GB of {LIMIT_BYTES / 1e9:.0f}: {'fits' if peak < LIMIT_BYTES else 'does not fit'}")
    if options.json:
        options.json.write_text(json.dumps({**found, "threads": options.threads}, indent=2) + "\n")


if __name__ == "__main__":
    main()
